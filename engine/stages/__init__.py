"""Stages and sets of images that several kinds of step use."""

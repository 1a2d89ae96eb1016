"""Stages and image sets that several step kinds share."""

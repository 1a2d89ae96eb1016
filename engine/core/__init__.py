"""Foundations: specs, steps and their keys, manifests, the store, shards, rows, the registry of
plugins, errors. Independent of images, networks and Ray."""

"""Foundations: specs, steps and their keys, manifests, the store, shards, rows, the plugin
registry, errors. Independent of images, networks and Ray."""

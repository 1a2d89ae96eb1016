"""What everything else is made of: specs, steps and their keys, manifests, the store, shards, rows,
the plugin registry, errors. Knows nothing of images, networks or Ray."""

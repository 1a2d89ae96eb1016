"""Pure functions on sets of embeddings: clusters, neighbours, choices."""

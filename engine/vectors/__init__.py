"""Functions on sets of embeddings: clusters, neighbours, selections, planes."""

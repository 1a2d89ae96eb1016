"""Maintenance of a whole storage: inventory, verification and garbage collection."""

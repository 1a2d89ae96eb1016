"""Attacks on whole studies: kills, damage, double starts, storage that fails. Minutes each; every
test prints the seed of its random choices."""

"""Attacks on whole studies: kills, damage, double starts, failing storage. Each test takes minutes
and prints the seed of its random choices."""

"""Benchmarks: `python -m benchmarks.<name> [--quick]`. Each prints what it reached beside what is
to be reached, and asserts nothing about time: machines are noisy, so a claim is a ratio of two
things run in turn."""

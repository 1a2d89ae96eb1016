"""Benchmarks: `python -m benchmarks.<name> [--quick]`. Each prints its result next to the target,
and asserts nothing about time: machines are noisy, so a claim is a ratio of two things run in turn.
"""

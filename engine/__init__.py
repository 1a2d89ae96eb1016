"""Synthetic images as training data: made, chosen, and proved to help."""

# The version of the distribution too (pyproject.toml); jobs also run where it is not installed.
__version__ = "0.1.0"

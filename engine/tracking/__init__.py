"""Logs of a run for other tools: MLflow and TensorBoard."""

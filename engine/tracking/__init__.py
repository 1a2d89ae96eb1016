"""What other tools read of a run: MLflow and TensorBoard."""

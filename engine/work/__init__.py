"""What a worker does, whoever started it: stages over shards, fits with checkpoints, and the
register of rows that kill or hang their process."""

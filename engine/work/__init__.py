"""The work of a worker on any runtime: stages over shards, fits with checkpoints, and the register
of rows that kill or hang their process."""

"""Results of steps: a frozen model for each kind of step, stored as the metrics of its manifest.

Readers use the model, never the stored JSON.
"""

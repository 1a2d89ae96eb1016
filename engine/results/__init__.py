"""What steps find out: a frozen model for each kind of step, stored as the metrics of its manifest.

A step publishes one; whoever needs it reads it through the model, never through the stored JSON.
"""

"""Training: averaged weights, checkpoints, guards, logs."""

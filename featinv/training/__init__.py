"""Training: callbacks, checkpoints, loggers."""

"""Training: averaged weights, checkpoints, guards, loggers."""

"""Errors, files, random numbers, pixels, processes."""

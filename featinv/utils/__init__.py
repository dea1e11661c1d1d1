"""Devices, downloads, errors, files, paths, pixels, precision, processes, seeds, timm models."""

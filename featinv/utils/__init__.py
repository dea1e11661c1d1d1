"""Devices, downloads, errors, files, paths, pixels, precision, processes, seeds, tensors, timm."""

"""The explorer: a local page on which to invert, mix and steer."""

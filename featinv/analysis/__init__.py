"""Analysis: what the features mean."""

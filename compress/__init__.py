"""A checkpoint becomes a smaller checkpoint."""

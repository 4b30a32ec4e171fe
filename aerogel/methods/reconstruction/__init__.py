"""Adjusting the weights that pruning has left."""

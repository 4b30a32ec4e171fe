"""Skipping and pruning experts."""

"""Policies that evict tokens from the key-value cache."""

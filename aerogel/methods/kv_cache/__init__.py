"""Quantization of the key-value cache."""

"""Compression methods, one a file; the folder is the list."""

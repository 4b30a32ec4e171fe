"""Measures of quality and cost, one a file."""

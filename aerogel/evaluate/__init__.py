"""Measures of quality and cost, one per file."""

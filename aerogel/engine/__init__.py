"""Compression engine: checks, the loop over the steps of a recipe, resume, provenance, results and search."""

"""Model families, one per file: module names and corrections to the discovered structure, as data."""

"""Architecture families, one a file: the names of their parts, as data."""

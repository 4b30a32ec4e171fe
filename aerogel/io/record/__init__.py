"""aerogel.json: the typed record of a run (schema, measures), and reading and writing it (files)."""

"""Running a model: generation, the fast decoder, the LM head."""

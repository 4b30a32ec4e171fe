"""Inference: text generation, the fast decoder, the LM head."""

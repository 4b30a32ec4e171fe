"""Runtime policies: feature caching, expert skipping and attention quantization during inference."""

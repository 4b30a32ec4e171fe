"""Quantized key-value caches: stores of keys and values in few bits, and the cache layers made of them."""

"""A run from its checks to its result: the only loop over steps, and what stands around it."""

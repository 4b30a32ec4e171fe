"""Tensor math: number formats, schemes, rounding, packing, rotation."""

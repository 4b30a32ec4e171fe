"""Modules that replace others in a model: quantized, split, timestep-indexed."""

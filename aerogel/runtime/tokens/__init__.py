"""Fewer tokens: positions of a forward are dropped before some block, and what comes after computes with the rest."""

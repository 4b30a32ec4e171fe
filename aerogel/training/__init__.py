"""Fitting a block or a network to its teacher."""

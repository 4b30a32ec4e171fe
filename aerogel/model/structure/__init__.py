"""Structure of a network, discovered from its modules and observed forwards: blocks, edges, residual stream, experts."""

"""Skipping experts: which token-expert assignments of an MoE model are dropped, and the backend that then does not compute them."""

"""Skipping experts: which tokens lose which of the experts they were routed to, and the backend that then does not run them."""

"""Searches: all policies of a kind on one model, held against each other, and the best one kept."""

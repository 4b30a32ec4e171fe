"""Policies that choose the tokens of an image in the vision tower, whatever the question is."""

"""Policies that drop and merge tokens of clips."""

"""Allocating zeros to layers."""

"""Policies that drop tokens: of images, of long prompts."""

"""Policies that drop positions of long prompts: of text, while the prompt is read."""

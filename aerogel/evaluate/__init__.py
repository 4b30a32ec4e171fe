"""What a network can still do and what it costs, one measure a file."""

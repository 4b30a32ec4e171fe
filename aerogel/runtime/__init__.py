"""What acts while a model runs, one folder a technique: put on and taken off in the same way."""

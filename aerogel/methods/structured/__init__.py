"""Methods that remove layers, channels and heads, so that models are smaller and faster in every engine."""

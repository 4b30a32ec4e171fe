"""Fast implementations of the functions in numerics, chosen by device, dtype and row count."""

"""Fast twins of numerics, chosen by device, dtype and row count."""

"""Methods for denoisers."""

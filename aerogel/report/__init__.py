"""HTML report, written from saved metrics."""

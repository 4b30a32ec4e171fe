"""One self-contained HTML file from saved metrics."""

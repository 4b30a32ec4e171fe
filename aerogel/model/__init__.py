"""Model structure: families, block walk, tracing, edges and statistics; knows no method and no family by name."""

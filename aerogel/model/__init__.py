"""How to look into a network; knows no method and no family by name."""

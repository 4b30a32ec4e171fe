"""VisionZip in the contract matrix, whose images have four patches; its rule is tested in test_tower_rules.py."""

MATRIX = {"options": {"dominant": 1, "contextual": 1}}

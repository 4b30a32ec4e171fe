"""Calibration and evaluation data, one modality per file."""

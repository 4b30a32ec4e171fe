"""Calibration and evaluation samples, one modality a file."""

"""Detectors that find boxes in score maps."""

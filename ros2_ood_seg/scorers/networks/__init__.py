"""Segmentation networks that scorers run."""

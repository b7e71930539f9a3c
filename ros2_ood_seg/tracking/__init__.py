"""Instances over time."""

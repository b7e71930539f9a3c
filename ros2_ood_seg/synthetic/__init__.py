"""Procedural road scenes with exact labels, for tests and the demo."""

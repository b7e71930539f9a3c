"""Data sets, metrics, bags and reports."""

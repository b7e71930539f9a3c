"""Outlier exposure and the training of scorer, prompt generator and compact segmenter."""

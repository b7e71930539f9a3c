"""Networks of the segmenters."""

"""Metrics of samples: networks, reference statistics, scores and their tables."""

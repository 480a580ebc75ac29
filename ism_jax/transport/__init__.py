"""Optimal transport between the noise and the data of a pool."""

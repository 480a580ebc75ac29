"""Data sources, one file per kind, and the loader of pools."""

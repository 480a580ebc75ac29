"""Few-step sampling, and pictures of samples."""

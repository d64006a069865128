"""Studies on real traces; run from the repository, not installed with the package."""

"""Named configurations, shipped as YAML package data."""

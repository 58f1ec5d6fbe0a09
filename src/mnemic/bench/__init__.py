"""Measurements: every number in the documentation comes from a command here and the JSON file it wrote."""

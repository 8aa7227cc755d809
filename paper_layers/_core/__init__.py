"""Helpers that every other folder of the package may use."""

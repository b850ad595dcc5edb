"""Measures and compares models, and writes a report."""

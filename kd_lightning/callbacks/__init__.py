"""Callbacks: which weights may move, or exist."""

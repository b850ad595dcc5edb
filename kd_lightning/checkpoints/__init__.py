"""Checkpoints: opened once, checked once, written whole."""

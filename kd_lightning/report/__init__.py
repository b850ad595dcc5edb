"""What was gained, measured and drawn."""

"""The three Lightning modules."""

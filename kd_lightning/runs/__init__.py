"""Training runs and what lies in their folders."""

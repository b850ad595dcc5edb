"""Training runs: their folders and what is rebuilt from them."""

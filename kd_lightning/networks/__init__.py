"""Networks for small images and the reading of their weights; plain PyTorch."""

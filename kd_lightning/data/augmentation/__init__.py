"""Augmentation of a batch on the device; each sample's is a function of (seed, sample, epoch)."""

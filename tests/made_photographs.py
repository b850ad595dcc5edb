"""Photographs that tests make: smooth colours, so that filters differ, with fine noise, so that every pixel counts."""

import numpy as np
from PIL import Image


def photograph(height: int, width: int, *, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Return a made photograph."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + random.integers(-20, 21, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)

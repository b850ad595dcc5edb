"""Split part of MNIST, for example its 10,000 test images, into a training and a test set for MNISTDataModule.

For machines that have no more of MNIST and cannot download it. The split is stratified. Results are comparable with
each other, but not with published ones.

    python scripts/lay_out_mnist.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz [--root data] [--test 2000]
"""

import argparse
import gzip
import struct
import sys
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split


def read_idx(path: Path) -> np.ndarray:
    """Return the contents of an idx file of bytes, compressed or not."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def idx_bytes(array: np.ndarray) -> bytes:
    """Return the contents of an idx file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def main() -> None:
    """Write the files and print the number of images of each class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="idx file, .gz or not")
    parser.add_argument("labels", type=Path, help="idx file, .gz or not")
    parser.add_argument("--root", type=Path, default=Path("data"), help="MNISTDataModule's root")
    parser.add_argument("--test", type=int, default=2000, help="number of test images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    options = parser.parse_args()
    images, labels = read_idx(options.images), read_idx(options.labels)
    splits = train_test_split(range(len(labels)), test_size=options.test, random_state=options.seed, stratify=labels)
    contents = {}
    for name, rows in zip(("train", "t10k"), map(sorted, splits), strict=True):
        contents[f"{name}-images-idx3-ubyte"] = idx_bytes(images[rows])
        contents[f"{name}-labels-idx1-ubyte"] = idx_bytes(labels[rows])
    folder = options.root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if (folder / name).exists() and (folder / name).read_bytes() != content:
            sys.exit(f"{str(folder / name)!r} exists with other content; remove it, or give another --root.")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name, rows in zip(("train", "test"), splits, strict=True):
        print(f"{len(rows)} images to {name}, by class: {np.bincount(labels[rows]).tolist()}")
    print(f"Read them with MNISTDataModule({str(options.root)!r}).")


if __name__ == "__main__":
    main()

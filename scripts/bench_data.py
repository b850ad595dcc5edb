"""Measure augmented images per second: batched augmentation, the loaders of two plain loops, and an upper bound.

The loaders are those of bench_baseline.py: PIL images in two workers, and uint8 tensors in up to eight. The bound
selects images by index and normalizes them, without augmentation. One torch thread beside the workers; the candidates
alternate in one process, and the median over the rounds is reported.

    python scripts/bench_data.py [--batch-size 128] [--rounds 7] [--device cpu]
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torchvision
from bench_baseline import competent_loader, naive_loader, normalize
from random_images import COUNT, MEAN, STD, RandomImages, endless, random_images
from timing import repeat, time_rounds


def main() -> None:
    """Print images per second and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=100, help="batches in each round")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    batched = RandomImages(options.batch_size).augmented_batches(device)
    images, labels = random_images()
    naive = endless(naive_loader(images, labels, options.batch_size))
    competent = endless(competent_loader(images, labels, options.batch_size, device))
    images = images.to(device)
    scale = torch.tensor([1 / (255 * s) for s in STD], device=device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], device=device)[:, None, None]

    def bound() -> torch.Tensor:
        return images[torch.randint(COUNT, (options.batch_size,), device=device)].mul(scale).add_(shift)

    def competent_batch() -> torch.Tensor:
        return normalize(next(competent)[0].to(device, non_blocking=True))

    candidates: dict[str, tuple[Callable[[], object], int]] = {
        "batched (ours)": (lambda: next(batched), options.batches),
        "naive loader": (lambda: next(naive)[0].to(device), max(1, options.batches // 5)),
        "competent loader": (competent_batch, options.batches),
        "bound": (bound, options.batches),
    }
    batches = {name: count for name, (_, count) in candidates.items()}
    seconds = time_rounds({name: repeat(*candidate) for name, candidate in candidates.items()}, options.rounds)
    rates = {name: [batches[name] * options.batch_size / each for each in rounds] for name, rounds in seconds.items()}
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"batch {options.batch_size}, {options.device}, one thread"
    )
    for name, values in rates.items():
        print(f"{name:<18}{median(values):>12,.0f} images/s   ({min(values):,.0f} to {max(values):,.0f})")
    ours, *others = (median(values) for values in rates.values())
    for name, rate in zip(list(rates)[1:], others, strict=True):
        print(f"ours / {name:<17} {ours / rate:.2f}")


if __name__ == "__main__":
    main()

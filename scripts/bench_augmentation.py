"""Measure what operations on colours cost an image, against torchvision's transforms image by image.

Each preset's part on colours (drawn and applied), and each operation alone with strengths that TrivialAugment draws. On
a CPU with one torch thread; the candidates alternate, and the median over the rounds is reported.

    python scripts/bench_augmentation.py [--size 160] [--batch-size 64] [--rounds 5] [--device cpu]
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count, cycle, islice
from statistics import median

import torch
import torchvision
from timing import time_rounds
from torch import Tensor
from torchvision.transforms import v2

from kd_lightning import Augmentation
from kd_lightning.data.augmentation.colours import Operation, apply_colours, draw_colours, plan_calls

PRESETS = {
    "standard": v2.TrivialAugmentWide(),
    "strong": v2.Compose([v2.RandAugment(), v2.ColorJitter(0.2, 0.2, 0.2)]),
}
TRIVIAL = {
    "shear x": "ShearX",
    "shear y": "ShearY",
    "translate x": "TranslateX",
    "translate y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "contrast": "Contrast",
    "saturation": "Color",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}
"""torchvision's names of TrivialAugment's operations."""
OTHERS: dict[str, tuple[Augmentation, Callable[[Tensor], Tensor]]] = {
    "hue": (Augmentation(hue=0.1), v2.ColorJitter(hue=0.1)),
    "grey": (Augmentation(grey=1.0), v2.Grayscale(3)),
    "blur": (Augmentation(blur=1.0), v2.GaussianBlur(17, (0.1, 2.0))),
}


def main() -> None:
    """Print milliseconds an image for each preset and each operation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = options.batch_size, 3, options.size, options.size
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(options.device)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {options.batch_size} images of "
        f"{options.size} pixels, {options.device}, one thread; ms an image"
    )
    print(f"{'':<18}{'batch':>8}{'one by one':>12}")
    for name, transform in PRESETS.items():
        print_costs(name, drawn(images, Augmentation(preset=name)), one_by_one(images, transform), images, options)
    strengths = trivial_strengths(options.batch_size)
    for name in TRIVIAL:
        print_costs(
            name, planned(images, strengths[name]), trivial_one_by_one(images, strengths[name]), images, options
        )
    for name, (augmentation, transform) in OTHERS.items():
        print_costs(name, drawn(images, augmentation), one_by_one(images, transform), images, options)


def print_costs(
    name: str,
    batch: Callable[[], object],
    single: Callable[[], object],
    images: Tensor,
    options: argparse.Namespace,
) -> None:
    """Print milliseconds an image of a batch at once and of its images one by one."""
    seconds = time_rounds({"batch": batch, "single": single}, options.rounds)
    ours, theirs = (1000 * median(times) / len(images) for times in seconds.values())
    print(f"{name:<18}{ours:8.3f}{theirs:12.3f}   {theirs / ours:5.1f} times")


def drawn(images: Tensor, augmentation: Augmentation) -> Callable[[], object]:
    """Return a function that draws a new view and applies its operations."""
    settings, views = Augmentation.resolve(augmentation, Augmentation()), count()
    samples = torch.arange(len(images))

    def run() -> Tensor:
        plan = draw_colours(samples, augmentation=settings, seed=0, view=next(views))
        assert plan is not None
        return apply_colours(images, plan._replace(orders=plan.orders.to(images.device)))

    return run


def planned(images: Tensor, operations: Sequence[Operation]) -> Callable[[], object]:
    """Return a function that applies an operation to each image."""
    plan = plan_calls([list(operations)], len(images))
    plan = plan._replace(orders=plan.orders.to(images.device))
    return lambda: apply_colours(images, plan)


def trivial_strengths(number: int) -> dict[str, list[Operation]]:
    """Return that many draws of each operation of TrivialAugment."""
    settings = Augmentation.resolve(Augmentation(trivial_augment=True), Augmentation())
    plan = draw_colours(torch.arange(50 * number), augmentation=settings, seed=0, view=0)
    assert plan is not None
    found: dict[str, list[Operation]] = defaultdict(list)
    for call in plan.stages.calls[0]:
        found[call.name].append((call.name, call.strength))
    return {name: list(islice(cycle(operations), number)) for name, operations in found.items()}


def trivial_one_by_one(images: Tensor, operations: Sequence[Operation]) -> Callable[[], object]:
    """Return a function that applies torchvision's operation to each image alone."""
    policy = v2.TrivialAugmentWide()
    shifted = {"brightness", "contrast", "saturation", "sharpness"}

    def run() -> list[Tensor]:
        return [
            policy._apply_image_or_video_transform(
                image, TRIVIAL[name], strength - (name in shifted), interpolation=policy.interpolation, fill={}
            )
            for image, (name, strength) in zip(images, operations, strict=True)
        ]

    return run


def one_by_one(images: Tensor, transform: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    """Return a function that applies a transform to each image alone."""
    return lambda: [transform(image) for image in images]


if __name__ == "__main__":
    main()

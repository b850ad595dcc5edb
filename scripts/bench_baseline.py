"""Measure the training loops with which the other benchmarks compare.

The naive loop is the one that would be written first: float32, NCHW, PIL transforms in a DataLoader of two workers,
torch's SGD. The competent loop is the one of someone who knows torch well: images stay uint8 through torchvision's v2
transforms in up to eight workers and pinned memory, and are normalized on the device; both networks run in bfloat16
autocast and channels-last memory, cuDNN picks its fastest kernels, SGD is fused. The teacher runs in each step of both.

    python scripts/bench_baseline.py [--teacher resnet56] [--batch-size 64] [--steps 20] [--device cpu]
"""

import argparse
import os
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from random_images import COUNT, MEAN, STD, endless, random_images
from timing import repeat, time_rounds
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from kd_lightning import networks

LOOPS = "naive loop", "competent loop"


class NaiveImages(Dataset[tuple[Tensor, int]]):
    """Images that torchvision's transforms augment one by one, through PIL."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


class CompetentImages(Dataset[tuple[Tensor, int]]):
    """Images that torchvision's v2 transforms crop and flip one by one, as uint8 tensors."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()
        self.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def naive_loader(images: Tensor, labels: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, int]]:
    """Return the naive loop's shuffled batches: normalized float32 images."""
    return DataLoader(NaiveImages(images, labels), batch_size, shuffle=True, num_workers=2, drop_last=True)


def competent_loader(
    images: Tensor, labels: Tensor, batch_size: int, device: torch.device
) -> DataLoader[tuple[Tensor, int]]:
    """Return the competent loop's shuffled batches: uint8 images, which ``normalize`` finishes on the device."""
    return DataLoader(
        CompetentImages(images, labels),
        batch_size,
        shuffle=True,
        num_workers=worker_count(device),
        pin_memory=device.type == "cuda",
        persistent_workers=True,
        drop_last=True,
    )


def worker_count(device: torch.device) -> int:
    """Return the competent loader's number of workers: two on a CPU, which they share with the training."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores) if device.type == "cuda" else 2


def normalize(images: Tensor) -> Tensor:
    """Return uint8 images normalized, in channels-last memory."""
    floats = v2.functional.to_dtype(images, torch.float32, scale=True)
    normalized: Tensor = v2.functional.normalize(floats, list(MEAN), list(STD), inplace=True)
    return normalized.contiguous(memory_format=torch.channels_last)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of both loops."""
    soft = F.kl_div((logits / 4).log_softmax(1), (teacher_logits / 4).softmax(1), reduction="batchmean") * 16
    return 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft


class NaiveStep:
    """A training step of the naive loop, including its batch."""

    def __init__(self, teacher: nn.Module, student: nn.Module, loader: Iterable[Any], device: torch.device) -> None:
        self.teacher, self.student = teacher.to(device).eval(), student.to(device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.batches, self.device = endless(loader), device

    def __call__(self) -> None:
        images, labels = (part.to(self.device) for part in next(self.batches))
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        loss = distillation_loss(self.student(images), teacher_logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class CompetentStep:
    """A training step of the competent loop, including its batch."""

    def __init__(self, teacher: nn.Module, student: nn.Module, loader: Iterable[Any], device: torch.device) -> None:
        self.teacher = teacher.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.student = student.to(device).to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
        )
        self.batches, self.device = endless(loader), device

    def __call__(self) -> None:
        images, labels = (part.to(self.device, non_blocking=True) for part in next(self.batches))
        images = normalize(images)
        chooses, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                teacher_logits = self.teacher(images)
            logits = self.student(images)
        loss = distillation_loss(logits.float(), teacher_logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        torch.backends.cudnn.benchmark = chooses  # a setting of the process, in which other loops are measured too


def baseline_steps(
    teacher: str, batch_size: int, device: torch.device, count: int = COUNT
) -> dict[str, Callable[[], None]]:
    """Return a step of each loop, by the loop's name.

    Args:
        teacher: Name of the teacher's network.
        batch_size: Number of images of a batch.
        device: Device of the networks.
        count: Number of images of an epoch.
    """
    images, labels = random_images(count)
    naive, competent = naive_loader(images, labels, batch_size), competent_loader(images, labels, batch_size, device)
    build = getattr(networks, teacher)
    steps = (
        NaiveStep(build(), networks.resnet20(), naive, device),
        CompetentStep(build(), networks.resnet20(), competent, device),
    )
    return dict(zip(LOOPS, steps, strict=True))


def main() -> None:
    """Print the speed of both loops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=COUNT)
    parser.add_argument("--steps", type=int, default=20, help="steps in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    steps = baseline_steps(options.teacher, options.batch_size, device, options.images)
    rounds = time_rounds({name: repeat(step, options.steps) for name, step in steps.items()}, options.rounds)
    for name, values in rounds.items():
        seconds = median(values) / options.steps
        print(f"{name:<14}{seconds * 1e3:8.1f} ms a step {options.batch_size / seconds:10,.0f} images/s")


if __name__ == "__main__":
    main()

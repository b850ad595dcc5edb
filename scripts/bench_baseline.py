"""Measure the training loop that a competent user would write first, with which bench_step.py compares.

float32, NCHW, PIL transforms in a DataLoader of two workers, torch's SGD, and the teacher's forward pass in each step.

    python scripts/bench_baseline.py [--teacher resnet56] [--batch-size 64] [--steps 20] [--device cpu]
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from random_images import MEAN, STD, endless, random_images
from timing import repeat, time_rounds
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kd_lightning import networks


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Images that torchvision's transforms augment one by one."""

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


def plain_loader(images: Tensor, labels: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, int]]:
    """Return a loader of shuffled, augmented batches."""
    return DataLoader(PlainImages(images, labels), batch_size, shuffle=True, num_workers=2, drop_last=True)


class PlainStep:
    """A training step of the loop, including its batch."""

    def __init__(self, teacher: nn.Module, student: nn.Module, loader: Iterable[Any], device: torch.device) -> None:
        self.teacher, self.student = teacher.to(device).eval(), student.to(device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.batches, self.device = endless(loader), device

    def __call__(self) -> None:
        images, labels = (part.to(self.device) for part in next(self.batches))
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.student(images)
        soft = F.kl_div((logits / 4).log_softmax(1), (teacher_logits / 4).softmax(1), reduction="batchmean") * 16
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def main() -> None:
    """Print the speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loader = plain_loader(*random_images(4096), options.batch_size)
    teacher, student = getattr(networks, options.teacher)(), networks.resnet20()
    step = PlainStep(teacher, student, loader, torch.device(options.device))
    (seconds,) = time_rounds({"steps": repeat(step, options.steps)}, 1)["steps"]
    print(f"{options.steps * options.batch_size / seconds:.0f} images/s, {seconds / options.steps * 1e3:.1f} ms a step")


if __name__ == "__main__":
    main()

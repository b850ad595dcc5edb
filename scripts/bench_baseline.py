"""The loop that a competent user would write first, which the other benchmarks compare with.

float32, NCHW, PIL transforms in a DataLoader of two workers, torch's SGD, the teacher asked in each step.

    python scripts/bench_baseline.py [--teacher resnet56] [--batch-size 64] [--steps 20] [--device cpu]
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timing import repeat, time_rounds
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kd_lightning import networks

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def random_images(count: int) -> tuple[Tensor, Tensor]:
    """uint8 ``(N, 3, 32, 32)`` and labels; what is in the images does not matter to the clock."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


class PlainImages(Dataset[tuple[Tensor, int]]):
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
    return DataLoader(PlainImages(images, labels), batch_size, shuffle=True, num_workers=2, drop_last=True)


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


class PlainStep:
    """One step of the loop, its batch included."""

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loader = plain_loader(*random_images(4096), options.batch_size)
    networks_used = getattr(networks, options.teacher)(), networks.resnet20()
    step = PlainStep(*networks_used, loader, torch.device(options.device))
    (spent,) = time_rounds({"steps": repeat(step, options.steps)}, 1)["steps"]
    print(f"{options.steps * options.batch_size / spent:.0f} images/s, {spent / options.steps * 1e3:.1f} ms a step")


if __name__ == "__main__":
    main()

"""Distill a class without showing the student a single image of it: Hinton's experiment of the omitted digit.

    python scripts/dark_knowledge.py [--omitted 3] [--temperature 8] [--epochs 60] [--seeds 3]

A teacher is trained on scikit-learn's digits. Students learn only from its outputs (alpha = 1: labels are not used), on
training images without one of the digits. They can learn about that digit only from the small probabilities that the
teacher assigns to it on images of other digits, which a high temperature increases. Since they predict it too rarely,
its bias is then raised until its mean probability on the validation images, whose labels are not used, is 10%.

G. Hinton, O. Vinyals, J. Dean: Distilling the Knowledge in a Neural Network, 2015, section 3,
https://arxiv.org/abs/1503.02531
"""

import argparse
import logging
import warnings
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.data.image_set import ImageSet
from kd_lightning.networks import ResNet


class WithoutOne(DigitsDataModule):
    """Digits whose training images lack one digit; the validation images show all of them."""

    omitted = 3

    def load(self, split: str) -> ImageSet | None:
        """Return the images of the teacher's split, those for training without the omitted digit."""
        if split not in ("train", "val"):
            return super().load(split)
        whole = DigitsDataModule(split_seed=0)
        whole.setup("fit")
        part = getattr(whole, f"{split}_dataloader")().dataset
        kept, labels, pixels = part.samples, part.images.labels, part.images.pixels
        if split == "train":
            kept = kept[labels[kept] != self.omitted]
        return ImageSet(labels[kept], pixels[kept])


def network() -> ResNet:
    """Return a small ResNet; teacher and students share one architecture, so that only the training differs."""
    return ResNet([1, 1, 1], [16, 32, 64], in_channels=1)


def trained(module: pl.LightningModule, data: DigitsDataModule, epochs: int) -> nn.Module:
    """Return the module after training, in eval mode."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet).fit(module, data)
    return module.eval()


@torch.no_grad()
def logits_and_labels(module: nn.Module, split: str) -> tuple[Tensor, Tensor]:
    """Return logits and labels of all validation or test images."""
    data = DigitsDataModule(split_seed=0)
    data.setup("fit" if split == "val" else split)
    batches = [data.augment(batch) for batch in getattr(data, f"{split}_dataloader")()]
    return torch.cat([module(batch.images) for batch in batches]), torch.cat([batch.labels for batch in batches])


def with_bias(logits: Tensor, validation: Tensor, omitted: int) -> Tensor:
    """Return logits with the bias of one class raised until its mean probability on validation images is one in ten."""
    low, high = 0.0, 50.0
    for _ in range(40):
        raised = (low + high) / 2 * nn.functional.one_hot(torch.tensor(omitted), logits.shape[1])
        share = float((validation + raised).softmax(1)[:, omitted].mean())
        low, high = (low, (low + high) / 2) if share > 1 / logits.shape[1] else ((low + high) / 2, high)
    return logits + low * nn.functional.one_hot(torch.tensor(omitted), logits.shape[1])


def experiment(omitted: int, temperature: float, epochs: int, seed: int) -> dict[str, list[float]]:
    """Return each student's accuracy on the omitted digit and on all digits, before and after raising the bias."""
    pl.seed_everything(seed, verbose=False)
    teacher = trained(TeacherModule(network()), DigitsDataModule(seed=seed, split_seed=0), epochs)
    data = WithoutOne(seed=seed)
    data.omitted = omitted
    accuracies: dict[str, list[float]] = {}
    for name, softened in {
        "without temperature (T = 1)": 1.0,
        f"with temperature (T = {temperature:g})": temperature,
    }.items():
        module = DistillationModule(network(), teacher.network, temperature=softened, alpha=1.0)  # type: ignore[arg-type]
        student = trained(module, data, epochs)
        (logits, labels), (validation, _) = logits_and_labels(student, "test"), logits_and_labels(student, "val")
        accuracies[name] = []
        for predictions in (logits.argmax(1), with_bias(logits, validation, omitted).argmax(1)):
            right = (predictions == labels).float()
            accuracies[name] += [float(right[labels == omitted].mean()), float(right.mean())]
    return accuracies


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omitted", type=int, default=3, choices=range(10))
    parser.add_argument("--temperature", type=float, default=8.0)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = [experiment(options.omitted, options.temperature, options.epochs, seed) for seed in range(options.seeds)]
    digit = options.omitted
    print(
        f"| student that never saw a {digit} | right on {digit}s | on all | {digit}s, bias raised | all, bias raised |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in found[0]:
        cells = [f"{mean(column):.1%}" for column in zip(*(accuracies[name] for accuracies in found), strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

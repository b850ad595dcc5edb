"""Batches of one image where a network has batch norms, and samples that do not make a batch."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import TeacherModule
from kd_lightning.errors import UserError
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|smaller than the logging|no `val_dataloader`).*"
)


def loader(count: int = 9, **options: Any) -> DataLoader:
    images, labels = torch.randn(count, 1, 8, 8), torch.arange(count) % 10
    return DataLoader(TensorDataset(images, labels), **{"batch_size": 4, **options})


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def pooled() -> nn.Sequential:
    layers = nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*layers)


class Tokens(nn.Module):
    """A batch norm behind a linear layer that sees several tokens of each image, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens.flatten(0, 1)).view(tokens.shape).mean(1))


class Steps(pl.Callback):
    """Counts the batches that were trained on."""

    count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("network", [linear, pooled])
def test_a_last_batch_of_one_image_is_refused_before_the_first_step(
    make_trainer: Trainers, network: Callable[[], nn.Module]
) -> None:
    steps = Steps()
    with pytest.raises(UserError, match=r"last training batch of an epoch has one image, .*'2'.* set drop_last=True"):
        make_trainer(callbacks=[steps]).fit(TeacherModule(network()), loader())
    assert steps.count == 0


@pytest.mark.parametrize(
    ("network", "data", "options"),
    [
        (linear(), loader(drop_last=True), {}),
        (linear(), loader(10), {}),
        (linear(), loader(), {"limit_train_batches": 2}),
        (Tokens(), loader(), {}),
        (ResNet([1, 1], [4, 8], 10, in_channels=1), loader(), {}),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loader(batch_size=1), {}),
    ],
    ids=["dropped", "two", "not reached", "tokens", "maps", "no batch norm"],
)
def test_what_plain_pytorch_trains_on_is_trained_on(
    make_trainer: Trainers, network: nn.Module, data: DataLoader, options: dict[str, Any]
) -> None:
    steps = Steps()
    make_trainer(callbacks=[steps], **options).fit(TeacherModule(network), data)
    assert steps.count == min(len(data), options.get("limit_train_batches", len(data)))


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_batch_norms_in_eval_mode_do_not_matter(make_trainer: Trainers) -> None:
    network, steps = linear(), Steps()
    network[2].eval()
    make_trainer(callbacks=[steps]).fit(TeacherModule(network), loader(batch_size=1))
    assert steps.count == 9


def test_where_the_length_is_not_known_the_error_says_what_to_do(make_trainer: Trainers) -> None:
    batches = [(torch.randn(4, 1, 8, 8), torch.arange(4)), (torch.randn(1, 1, 8, 8), torch.arange(1))]
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        make_trainer().fit(TeacherModule(linear()), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert "set drop_last=True in the loader" in raised.value.__notes__[0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "images",
    [
        [Image.new("L", (8, 8))] * 2,
        [torch.rand(1, 8, 8), Image.new("L", (8, 8))],
        [torch.rand(1, 8, n) for n in (8, 9)],
    ],
    ids=["images", "an image and a tensor", "two sizes"],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_samples_that_do_not_make_a_batch(make_trainer: Trainers, images: Any, workers: int, stage: str) -> None:
    data: Any = DataLoader(list(zip(images, [0, 1], strict=True)), batch_size=2, num_workers=workers)  # type: ignore[arg-type]
    with pytest.raises((TypeError, RuntimeError, AttributeError)) as raised:
        getattr(make_trainer(), stage)(TeacherModule(linear()), data)
    assert "they must be tensors of one size; convert images" in raised.value.__notes__[0]


def test_a_network_with_one_logit_is_refused(make_trainer: Trainers) -> None:
    with pytest.raises(UserError, match=r"one logit for each image, .* two for two classes"):
        make_trainer().fit(TeacherModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 1))), loader())

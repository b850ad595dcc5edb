"""Each tag of a run has a description where TensorBoard reads it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.callbacks import GapClosed, TensorBoardImages
from kd_lightning.callbacks.tag_descriptions import describe_tag, describe_tags
from kd_lightning.losses import AttentionLoss, HardTargetLoss, SoftTargetLoss
from kd_lightning.networks import ResNet

PLUGINS = "scalars", "images"


def descriptions(folder: str) -> dict[str, str]:
    """Return the description of each scalar and image of a run, as TensorBoard's server reads it."""
    found = EventAccumulator(folder)
    found.Reload()
    there = [plugin for plugin in PLUGINS if plugin in found.ActivePlugins()]
    tags = {tag for plugin in there for tag in found.PluginTagToContent(plugin)}
    return {tag: found.SummaryMetadata(tag).summary_description for tag in tags}


def test_every_tag_of_a_distillation_and_its_test_is_described(tmp_path: Path) -> None:
    student, teacher = (ResNet(blocks=[1, 1], widths=[w, 2 * w], in_channels=1) for w in (4, 8))
    losses: dict[str, Any] = {
        "hard": HardTargetLoss(),
        "soft": SoftTargetLoss(4.0),
        "maps": AttentionLoss(student_layers=["layer1"], teacher_layers=["layer1"]),
    }
    module = DistillationModule(student, teacher, losses=losses, teacher_check="warn")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=TensorBoardLogger(tmp_path, default_hp_metric=False),
        callbacks=[TensorBoardImages(), GapClosed(0.01)],
    )
    data = DigitsDataModule(batch_size=256)
    with pytest.warns(UserWarning, match="teacher"):  # which is not trained
        trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    found = descriptions(str(trainer.log_dir))
    assert {tag for tag, text in found.items() if not text} == set()
    assert found["val/accuracy"] == (
        "Fraction of images whose most probable class is the label. Measured on the validation images, on which the "
        "best epoch is chosen."
    )
    assert "`maps`" in found["train/maps"]
    for tag in ("train/views", "test/per_class", "hp/test_accuracy", "learning_rate", "train/loss_step"):
        assert found[tag] == describe_tag(tag) != ""


@pytest.mark.parametrize(
    ("tag", "beginning"),
    [
        ("val/accuracy/dataloader_idx_1", "Fraction of images whose most probable class"),
        ("train/images_target", "Training images of the first batch"),
        ("train/adversarial_domain_accuracy", "The term `adversarial_domain_accuracy`"),
        ("oracle/accuracy", "Fraction of images"),
    ],
)
def test_variants_of_a_tag_are_described_as_the_tag_is(tag: str, beginning: str) -> None:
    assert describe_tag(tag).startswith(beginning)


def test_tags_of_others_stay_as_they_are(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path)
    describe_tags(writer)
    describe_tags(writer)  # once for each stage
    for step in range(2):
        writer.add_scalar("mine/value", 0.5, step)
        writer.add_scalar("val/loss", 0.5, step)
        writer.add_scalar("val/ece", 0.5, step, new_style=True)  # whose metadata are torch's
    writer.close()
    found = descriptions(str(tmp_path))
    assert found["mine/value"] == ""
    assert found["val/loss"] == describe_tag("val/loss")
    assert found["val/ece"] == ""
    assert describe_tag("mine/value") == describe_tag("val/mine") == describe_tag("accuracy") == ""


def test_tensorboards_server_shows_the_descriptions(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path)
    describe_tags(writer)
    writer.add_scalar("val/accuracy", 0.5, 3)
    writer.add_image("train/images", np.zeros((3, 4, 4), dtype=np.uint8), 0)
    writer.close()
    with serving(tmp_path) as address:
        for plugin, tag in {"scalars": "val/accuracy", "images": "train/images"}.items():
            with urlopen(f"{address}data/plugin/{plugin}/tags", timeout=60) as answer:
                assert describe_tag(tag) in json.load(answer)["."][tag]["description"]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder as the command `tensorboard` does, with its own data server; yields the address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = (re.search(r"http://\S+", line) for line in process.stderr)
        try:
            yield next(filter(None, found))[0]
        finally:
            process.terminate()

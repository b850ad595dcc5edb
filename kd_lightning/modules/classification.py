"""The base of all modules: optimizes, evaluates and saves one network."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_lightning.callbacks.data_check import DataCheck
from kd_lightning.callbacks.devices import check_device, describe_devices, describe_precision
from kd_lightning.callbacks.early_stop import EarlyStopReport
from kd_lightning.callbacks.epoch_metrics import EpochMetrics
from kd_lightning.callbacks.exact_resume import ExactResume
from kd_lightning.callbacks.finite_guard import FiniteGuard, StepRecord
from kd_lightning.callbacks.out_of_memory import OutOfMemoryAdvice
from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.io import use_atomic_checkpoints
from kd_lightning.checkpoints.rebuild import rebuild_module
from kd_lightning.checkpoints.trust import unserializable
from kd_lightning.data.labels import check_labels
from kd_lightning.data.read_batch import read_batch, read_to_predict
from kd_lightning.errors import UserError
from kd_lightning.features import logits_of
from kd_lightning.files.format import FORMAT, KEY
from kd_lightning.modules import optim
from kd_lightning.modules.evaluation import Evaluation, Prediction
from kd_lightning.modules.example_images import example_images
from kd_lightning.modules.schedule import SchedulerFactory
from kd_lightning.networks import DataConfig, data_config, set_data_config
from kd_lightning.networks.channel_slicing import slice_to, sliced_shapes
from kd_lightning.networks.compiled import unwrap_compiled
from kd_lightning.networks.data_config import check_same_classes
from kd_lightning.networks.dry_run import (
    check_initialized,
    check_precision,
    count_classes,
    describe_probabilities,
    input_dtype,
    returns_probabilities,
    to_input_dtype,
    try_forward,
)
from kd_lightning.networks.memory_format import contiguous, use_channels_last
from kd_lightning.networks.normalization import normalization_between
from kd_lightning.networks.placement import weight_device
from kd_lightning.networks.weights import check_fits


class ClassificationModule(pl.LightningModule, ABC):
    """Optimizes, evaluates and saves the network under ``network``; a subclass defines ``training_step``.

    Batches are ``(images, labels)`` or ``(images, labels, ids)``, and what follows is ignored: images are floats
    ``(B, channels, H, W)``; labels are class indices, any integers ``(B,)`` or ``(B, 1)``, -1 where unlabelled, or
    class probabilities, floats ``(B, C)`` whose rows sum to 1. ``predict`` takes images without labels too.

    Of several validation or test loaders the first has the metrics ``val/accuracy`` and so on, which callbacks and
    schedules follow; the next has ``val/accuracy/loader_1`` and so on.

    Args:
        network: Network to train, images ``(B, channels, H, W)`` to logits ``(B, C)``.
        learning_rate: Learning rate of the optimizer, the peak of the default schedule; ``None`` for 0.1, or for the
            own rate of an ``optimizer`` that is given.
        weight_decay: Weight decay of the optimizer; ``None`` for 5e-4, or for the own one of an ``optimizer`` that is
            given. Norms, biases and what the network's ``no_weight_decay()`` names are exempt.
        optimizer: Function from parameter groups to an optimizer, for example ``torch.optim.AdamW``; by default SGD
            with Nesterov momentum 0.9. With an optimizer of your own the rate is constant unless ``lr_scheduler`` is
            given. An argument of the optimizer that equals its class's default counts as not given; another one beside
            a different ``learning_rate`` or ``weight_decay`` is refused.
        lr_scheduler: Function from the optimizer to a scheduler; by default one cycle over the steps of ``max_epochs``.
        lr_interval: Unit in which ``lr_scheduler`` advances, ``"step"`` or ``"epoch"``.
        lr_monitor: Logged metric that a ``ReduceLROnPlateau`` follows.
        compile: Compile the network in place (``network.compile()``, no key of its state changes) in ``fit``: that
            takes up to half a minute at the start, and the gain depends on the hardware. A network that
            ``torch.compile`` has wrapped is unwrapped, and compiled so; its mode and backend are not used.
        on_nonfinite: Reaction to a loss or gradient that is not finite, before the weights are updated: ``"stop"``
            raises an error with the step, the term and the ranges, ``"skip"`` skips the update and counts it.

    Raises:
        UserError: If an argument is out of range, or the network has uninitialized layers.
    """

    takes_pairs: ClassVar[bool] = False
    """Whether training batches keep a source and a target apart."""

    learns_without_labels = False
    """Whether it learns from unlabelled images, through a teacher."""

    network_argument: ClassVar[str] = "network"
    """Name of the constructor's argument for the trained network."""

    def __init__(
        self,
        network: nn.Module,
        *,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        optimizer: optim.OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["step", "epoch"] = "epoch",
        lr_monitor: str = "val/loss",
        compile: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        network, compiled = unwrap_compiled(network)
        check_initialized(network)
        self.network = network
        self.optimization = optim.Optimization(
            learning_rate, weight_decay, optimizer, lr_scheduler, lr_interval, lr_monitor
        )
        self._new_rate = False
        self.compiles = compile or compiled
        self.channels_last = False
        self.num_classes: int | None = None
        self.image_shape: tuple[int, ...] | None = None
        self.convert_input: nn.Module = nn.Identity()
        self.evaluations: dict[int, Evaluation] = {}
        self.confusion: Tensor | None = None
        self.epoch_metrics = EpochMetrics()
        self.finite_guard = FiniteGuard(on_nonfinite, self.epoch_metrics)
        # of the subclass's constructor too, which is on the stack
        objects = ("network", "student", "teacher", "losses", "optimizer", "lr_scheduler")
        self.save_hyperparameters(ignore=unserializable(*objects))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of images ``(B, channels, H, W)`` that are normalized by the data module."""
        return logits_of(self.network(self.network_input(images)), self.network)

    def network_input(self, images: Tensor) -> Tensor:
        """Return images of the data module as the network takes them: in its statistics, type and memory format."""
        images = self.convert_input(images)
        # other precisions convert batches, mixed ones those of half precision
        if images.dtype == torch.float64 or self._trainer is None or self._trainer.precision == "32-true":
            images = images.to(input_dtype(self.network))
        return images if self.channels_last else contiguous(images)

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""

    def configure_callbacks(self) -> list[pl.Callback]:
        """Attach what watches the run; see each callback."""
        attached: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds = {type(callback) for callback in attached}
        new = [kind() for kind in (ExactResume, OutOfMemoryAdvice, DataCheck, EarlyStopReport) if kind not in kinds]
        own = [self.finite_guard, self.epoch_metrics]
        return [*new, *(callback for callback in own if callback not in attached)]

    def setup(self, stage: str) -> None:
        """Check network and data against each other before the first step."""
        check_device(self.trainer)
        use_atomic_checkpoints(self.trainer.strategy)
        self._match_data()
        images = example_images(self.trainer, pairs=self.takes_pairs)
        if images is not None:
            self.dry_run(images)
        if stage == "fit" and self.compiles:
            self.network.compile()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.setup(self.trainer, self, stage)  # it has copied the module before this hook finished it

    def dry_run(self, images: Tensor) -> None:
        """Run the network on two images, to choose its memory format and to learn the number of classes.

        The format is chosen before DDP wraps the module, since gradients have it too.

        Args:
            images: ``(2, channels, H, W)``.

        Raises:
            UserError: If the network does not return logits ``(2, C)``, or C is not the data's number of classes.
        """
        images = to_input_dtype(images, self.network)
        self.image_shape = tuple(images.shape[1:])
        check_precision(self.network, str(self.trainer.precision))
        name = type(self.network).__name__
        logits = try_forward(self, lambda: self._first_forward(images), name, images, self.network)
        if returns_probabilities(logits):
            rank_zero_warn(describe_probabilities(f"The network {name}"))
        if self.trainer.state.fn == "fit" and getattr(self.network, "aux_logits", False):
            rank_zero_warn(f"{name} has auxiliary classifiers, which no loss trains; build it with aux_logits=False.")
        self.num_classes = count_classes(self.network, logits, getattr(self.data_module, "num_classes", None) or None)

    def _first_forward(self, images: Tensor) -> Tensor:
        self.channels_last = use_channels_last(self.network, lambda: self(images))
        return self(images)  # type: ignore[no-any-return]

    @property
    def data_module(self) -> Any:
        """The data module of the trainer, if there is one."""
        return self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]

    @property
    def data(self) -> DataConfig:
        """The statistics and classes of the data module's images."""
        return DataConfig.of(*(getattr(self.data_module, name, None) for name in DataConfig._fields))

    def _match_data(self) -> None:
        known, data = data_config(self.network), self.data
        self.convert_input = normalization_between(data, known).to(weight_device(self.network))
        if self.trainer.state.fn == "fit":  # from now on its weights are trained on these data
            statistics = data if known.mean is None else known
            set_data_config(self.network, statistics._replace(classes=data.classes or known.classes))
        else:
            check_same_classes("The network", known, data)

    def configure_optimizers(self) -> Any:
        """Return SGD with one cycle in steps, unless others are given."""
        return self.optimization.configure(self, self.network, self.trainer)

    @property
    def learning_rate(self) -> float | None:
        """The ``learning_rate`` of the constructor; Lightning's ``LearningRateFinder`` and ``Tuner`` set it."""
        return self.optimization.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.optimization = replace(self.optimization, learning_rate=rate)
        self._new_rate = self._trainer is not None

    def on_train_start(self) -> None:
        """Print what makes the training fast, and what else could."""
        if self._new_rate:  # found after the optimizer was built
            if self.trainer.global_step > 0:
                raise UserError("A resumed run keeps its own learning rate; remove the callback that searches one.")
            self.trainer.strategy.setup_optimizers(self.trainer)
            self._new_rate = False
        rank_zero_info(f"Speed: {'; '.join(self.describe_speed())}.")

    def describe_speed(self) -> list[str]:
        """Return what makes the training fast, and what else could."""
        compiled = "is compiled" if self.compiles else "is not compiled (compile=true may be faster in long runs)"
        contiguous = "the network runs in contiguous memory (reshape in place of view allows channels-last)"
        layout = [] if self.channels_last else [contiguous]
        return [describe_devices(self.trainer), describe_precision(self.trainer), f"the network {compiled}", *layout]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Prepare torch's fused SGD for updates that may be skipped."""
        optim.init_momentum_buffers(optimizer)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip as Lightning does, unless the update is skipped: torch cannot clip by value without gradients."""
        if any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"]):
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def log_step(
        self, loss: Tensor, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        """Add a batch to the epoch's means, show it to the finite guard, and log every ``log_every_n_steps``.

        Args:
            loss: The loss, a scalar.
            terms: Its unweighted terms by name.
            logits: Output of the trained network, ``(B, C)``.
            labels: Class indices ``(B,)`` or probabilities ``(B, C)``.
            tensors: Further tensors that the loss was computed from, whose ranges an error would report.
        """
        place = f"Epoch {self.current_epoch}, step {self.trainer.global_step}"
        self.finite_guard.observe(StepRecord(place, {**terms, "loss": loss}, {**tensors, "logits": logits}))
        self.epoch_metrics.add(loss, terms, logits, labels)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log("train/loss_step", loss.detach(), prog_bar=True)
            self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of validation images."""
        self._evaluate(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation images."""
        self._finish_evaluation("val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of test images."""
        self._evaluate(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test images."""
        self._finish_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Return the most probable label of each image, and its probability."""
        images, _, ids = read_to_predict(batch)
        probabilities, labels = self(images).float().softmax(1).max(1)
        return Prediction(ids, labels, probabilities)

    def reference_logits(self, images: Tensor, batch_idx: int | None = None) -> Tensor | None:
        """Return logits ``(B, C)`` with which predictions are compared, a teacher's for example, or ``None``.

        Args:
            images: ``(B, channels, H, W)``.
            batch_idx: Number of the batch in the first loader of an evaluation, which is the same in each epoch.
        """
        return None

    def _evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        images, labels, _ = read_batch(batch)
        logits = self(images)
        self.num_classes = logits.shape[1]
        check_labels(labels, num_classes=self.num_classes)
        if dataloader_idx not in self.evaluations:
            self.evaluations[dataloader_idx] = Evaluation(logits.shape[1]).to(logits.device)
        reference = self.reference_logits(images, batch_idx if dataloader_idx == 0 else None)
        self.evaluations[dataloader_idx].update(logits, labels, reference)

    def _finish_evaluation(self, split: str) -> None:
        # created again in the mode (no_grad or inference) of the next evaluation
        evaluations, self.evaluations = self.evaluations, {}
        for number, evaluation in evaluations.items():
            metrics = evaluation.compute()
            confusion = metrics.pop("confusion", None)
            if number == 0:
                self.confusion = confusion
            suffix = f"/loader_{number}" if number else ""  # Lightning keeps its own suffix to itself
            self.log_metrics(split, {f"{name}{suffix}": value for name, value in metrics.items()})

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, and nothing under ``Trainer(barebones=True)``, where it would warn in each step."""
        if not self.trainer.barebones:
            super().log(*args, **kwargs)

    def log_metrics(self, split: str, metrics: dict[str, Tensor]) -> None:
        """Log the metrics of an epoch as ``split/name``."""
        for name, value in metrics.items():
            self.log(f"{split}/{name}", value, prog_bar=name == "accuracy", sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the network needs to be used elsewhere, as plain data: its input and classes, and its widths."""
        checkpoint[KEY] = FORMAT
        checkpoint["data_config"] = data_config(self.network)._asdict()
        if (shapes := sliced_shapes(self.network)) is not None:
            checkpoint["sliced_shapes"] = shapes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        if isinstance(checkpoint.get("sliced_shapes"), dict):
            slice_to(self.network, checkpoint["sliced_shapes"])
        set_data_config(self.network, DataConfig.of(**checkpoint.get("data_config", {})))
        if self._trainer is not None:
            self._match_data()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load as torch does; weights of another network raise one sentence."""
        with check_fits(self, state_dict):
            return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning has a descriptor in its place
        cls,
        checkpoint_path: str | Path | Checkpoint,
        map_location: str | torch.device | None = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        """Rebuild a module from a checkpoint as Lightning does, but read the file as data.

        Its checksums are compared, and it may only name networks, losses, optimizers and schedulers of kd_lightning,
        torch, torchvision and modules that are already imported. Code in it is not run, whatever ``weights_only`` is.
        An open :class:`Checkpoint` is not read again.

        Raises:
            UserError: If the file is damaged, contains code, names anything else, or was saved from Python and the
                networks are not passed again.
        """
        places: dict[str, Any] = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict}
        return rebuild_module(cls, checkpoint_path, kwargs, network=cls.network_argument, **places)

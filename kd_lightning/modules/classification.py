"""What every module shares: the optimization, evaluation and saving of one network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_lightning.callbacks.devices import check_device, describe_devices, describe_precision
from kd_lightning.callbacks.exact_resume import ExactResume
from kd_lightning.callbacks.finite_guard import FiniteGuard, Seen
from kd_lightning.callbacks.out_of_memory import OutOfMemoryAdvice
from kd_lightning.callbacks.running_means import RunningMeans
from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.io import use_atomic_checkpoints
from kd_lightning.checkpoints.rebuild import rebuild_module
from kd_lightning.errors import UserError
from kd_lightning.files.format import FORMAT, KEY
from kd_lightning.modules.evaluation import Evaluation
from kd_lightning.modules.example_images import example_images
from kd_lightning.modules.optimizer_choice import build_optimizer, build_scheduler, unclippable
from kd_lightning.modules.schedule import init_momentum_buffers, layerwise_decay_groups, one_cycle, parameter_groups
from kd_lightning.networks import DataConfig, data_config
from kd_lightning.networks.channel_slicing import slice_to
from kd_lightning.networks.data_config import check_same_classes
from kd_lightning.networks.dry_run import check_initialized, try_forward
from kd_lightning.networks.normalization import normalization_between
from kd_lightning.networks.placement import weight_device
from kd_lightning.networks.weights import state_dict_mismatch

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRSchedulerTypeUnion]


class Prediction(NamedTuple):
    """What ``predict`` gives for a batch, ``(B,)`` each: ids (``None`` for a plain loader), labels, probabilities."""

    ids: Tensor | None
    labels: Tensor
    probabilities: Tensor


class ClassificationModule(pl.LightningModule, ABC):
    """Optimizes, evaluates and saves the network under ``network``; a subclass defines ``training_step``.

    Batches are ``(images, labels)`` or ``(images, labels, ids)``; label -1 means unlabelled.

    Args:
        network: The network that is trained, images to logits.
        learning_rate: Peak of the default schedule.
        weight_decay: Of the default optimizer; norms and biases are left out.
        optimizer: Makes an optimizer from parameter groups; by default SGD with Nesterov momentum 0.9.
        lr_scheduler: Makes a scheduler from the optimizer; by default one cycle over the steps of ``max_epochs``.
        lr_interval: Whether ``lr_scheduler`` moves after each step or each epoch.
        compile: Whether ``fit`` compiles the network in place.
        on_nonfinite: What happens where a loss or a gradient is not finite, before the weights are touched: ``"stop"``
            ends the training with the step, the term and the ranges named, ``"skip"`` leaves the update out and counts
            it.
    """

    layer_decay = 1.0
    """What the learning rate of a part of the network is, as a share of that of the part after it."""

    takes_pairs = False
    """Whether batches keep a source and a target apart."""

    network_argument = "network"
    """What the constructor calls the trained network."""

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float,
        weight_decay: float,
        optimizer: OptimizerFactory | None,
        lr_scheduler: SchedulerFactory | None,
        lr_interval: Literal["step", "epoch"],
        compile: bool,
        on_nonfinite: Literal["stop", "skip"],
    ) -> None:
        super().__init__()
        if not learning_rate > 0 or not weight_decay >= 0:
            raise UserError(
                f"learning_rate must be above 0 and weight_decay >= 0, got {learning_rate} and {weight_decay}."
            )
        check_initialized(network)
        self.network = network
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.lr_interval = lr_interval
        self.compiles = compile
        self.num_classes: int | None = None
        self.convert_input: nn.Module = nn.Identity()
        self.evaluation: Evaluation | None = None
        self.means = RunningMeans()
        self.finite = FiniteGuard(on_nonfinite)
        self.confusion: Tensor | None = None
        self.training_seconds, self._since = 0.0, 0.0
        self._first_epoch = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images ``(B, channels, H, W)`` that are normalised as the data module does."""
        return self.network(self.convert_input(images))

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one batch."""

    def configure_callbacks(self) -> list[pl.Callback]:
        """Attach what lets a run resume to the same bits, and what explains a full memory."""
        attached = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [kind() for kind in (ExactResume, OutOfMemoryAdvice) if kind not in attached]

    def setup(self, stage: str) -> None:
        """Check network and data against each other before the first step."""
        check_device(self.trainer)
        # convolutions are fastest so, and DDP wants the layout of gradients before it wraps the module
        self.to(memory_format=torch.channels_last)
        use_atomic_checkpoints(self.trainer.strategy)
        if stage == "fit":
            self._refuse_other_batches()
        self._match_data()
        images = example_images(self.trainer)
        if images is not None:
            self.dry_run(images)
        if stage == "fit" and self.compiles:
            self.network.compile()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.setup(self.trainer, self, stage)  # it has copied the module before this hook finished it

    def _refuse_other_batches(self) -> None:
        ours, pairs = hasattr(self._datamodule, "splits"), getattr(self._datamodule, "yields_pairs", False)
        if self.takes_pairs and ours and not pairs:
            raise UserError(
                f"{type(self).__name__} trains on a source and a target; give it a DomainPairDataModule of two data "
                "modules (not joined)."
            )
        if pairs and not self.takes_pairs:
            raise UserError(
                f"{type(self).__name__} takes no pairs of domains; set joined: true in DomainPairDataModule, or use "
                "AdaptationModule."
            )

    def dry_run(self, images: Tensor) -> None:
        """Run the network once on two images, to learn the number of classes.

        Args:
            images: ``(2, channels, H, W)``.

        Raises:
            ValueError: If the network does not turn them into ``(2, C)`` logits, or C is not the data's.
        """
        images = self._to_input_dtype(images)
        logits = try_forward(self, lambda: self(images), type(self.network).__name__, images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise UserError(f"{type(self.network).__name__} must return logits (B, C), one row for each image.")
        self.num_classes = logits.shape[1]
        wanted = getattr(self._datamodule, "num_classes", None)
        if wanted is not None and wanted != self.num_classes:
            raise UserError(
                f"The network tells {self.num_classes} classes apart and the data have {wanted}; build it with "
                f"num_classes={wanted}, or give it a new head with replace_head."
            )

    def _to_input_dtype(self, images: Tensor) -> Tensor:
        """Return images in the type and on the device of the network's weights (``bf16-true`` has its own type)."""
        weight = next(self.network.parameters(), images)
        return images.to(weight.device, weight.dtype if weight.is_floating_point() else images.dtype)

    @property
    def data(self) -> DataConfig:
        """What the attached data module says of its images."""
        source = self._datamodule
        return DataConfig.of(*(getattr(source, name, None) for name in DataConfig._fields))

    @property
    def _datamodule(self) -> Any:
        return self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]

    def _match_data(self) -> None:
        known, data = data_config(self.network), self.data
        self.convert_input = normalization_between(data, known).to(weight_device(self.network))
        if self.trainer.state.fn == "fit":  # from here on its weights are made by these data
            statistics = data if known.mean is None else known
            self.network.data_config = statistics._replace(classes=data.classes or known.classes)  # type: ignore[assignment]
        else:
            check_same_classes("The network", known, data)

    def configure_optimizers(self) -> Any:
        """SGD and one cycle in steps, unless others are given."""
        groups = parameter_groups(self.parameters())
        if self.layer_decay != 1:
            own = set(self.network.parameters())
            groups = layerwise_decay_groups(self.network, self.layer_decay)
            groups += parameter_groups(weight for weight in self.parameters() if weight not in own)
        if not groups:
            raise UserError("All weights are frozen, so nothing would train; set requires_grad for some of them.")
        if self.optimizer_factory is None:
            fused = not unclippable(self.trainer)  # one kernel for all weights
            options: dict[str, Any] = {"weight_decay": self.weight_decay, "momentum": 0.9, "nesterov": True}
            optimizer: Optimizer = torch.optim.SGD(groups, lr=self.learning_rate, fused=fused, **options)
        else:
            optimizer = build_optimizer(self.optimizer_factory, groups, self.trainer)
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        if self.scheduler_factory is not None:
            schedule = build_scheduler(self.scheduler_factory, optimizer, self.lr_interval, self.trainer)
            return {"optimizer": optimizer, "lr_scheduler": schedule}
        if self.optimizer_factory is not None:
            return optimizer
        curve = partial(one_cycle, total_steps=self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.LambdaLR(optimizer, curve)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_train_start(self) -> None:
        """Refuse a batch of one, which has no variance that batch norm could use."""
        self._since, self._first_epoch = perf_counter(), self.current_epoch
        rank_zero_info(f"Speed: {'; '.join(self.speed())}.")
        normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.network.modules())
        loader = self.trainer.train_dataloader
        if normed and getattr(loader, "batch_size", None) == 1:
            raise UserError("Batch norm needs more than one image in a batch; set batch_size to 2 or more.")

    def speed(self) -> list[str]:
        """What makes the training quick, and what would."""
        return [
            describe_devices(self.trainer),
            describe_precision(self.trainer),
            "the network is compiled"
            if self.compiles
            else "the network is not compiled (compile=true may pay in long runs)",
        ]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the labels of data that are not ours: where a look waits for the device, in the first epoch alone."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.finite.begin(self, self.means)
        ours = hasattr(self._datamodule, "splits")  # which looks at all labels when it reads them
        labels = (batch["source"] if isinstance(batch, dict) else batch)[1]
        if not ours and (self.current_epoch == self._first_epoch or labels.device.type == "cpu"):
            self._check_labels(labels)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the update out if it is not finite."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.finite.decide(self, self.means, optimizer, scaled)
        init_momentum_buffers(optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does; an update that is left out has no gradients, which torch cannot clip by value."""
        if any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"]):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_start(self) -> None:
        """Begin anew to sum up."""
        self.means, self.finite, self.training_seconds = RunningMeans(), FiniteGuard(self.finite.mode), 0.0
        self._since = perf_counter()

    def record(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        logits: Tensor,
        labels: Tensor,
        tensors: dict[str, Tensor],
    ) -> None:
        """Keep sums over the epoch on the device, remember what a batch was like, and log now and then.

        Args:
            loss: What is minimized.
            terms: Its unweighted terms by name.
            logits: ``(B, C)`` of the network.
            labels: Class indices ``(B,)`` or probabilities ``(B, C)``.
            tensors: What else the loss was computed from, to name its range if the loss is not finite.
        """
        place = f"Epoch {self.current_epoch}, step {self.trainer.global_step}"
        self.finite.look(Seen(place, {**terms, "loss": loss}, {**tensors, "logits": logits}))
        with torch.no_grad():
            labelled: Tensor | int = len(logits)
            if labels.is_floating_point():
                right = logits.argmax(1) == labels.argmax(1)
            else:
                right, labelled = logits.argmax(1) == labels, (labels >= 0).sum()
            accuracy = right.sum() / torch.as_tensor(labelled, device=logits.device).clamp(min=1)
            values = {"loss": loss, "accuracy": accuracy, **terms}
            counts = {**dict.fromkeys(values, len(logits)), "accuracy": labelled}
            self.means.add(values, counts)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss_step", loss.detach(), prog_bar=True)
            self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the time of training alone."""
        now = perf_counter()
        self.training_seconds, self._since = self.training_seconds + now - self._since, now

    def on_train_epoch_end(self) -> None:
        """Log the means over the epoch and all ranks, and the images per second."""
        self.finite.settle(self)
        if self.means.sums is None:
            return
        total = self.trainer.strategy.reduce(self.means.sums, reduce_op="sum")
        figures = self.means.compute(total)
        if self.training_seconds:
            figures["images_per_second"] = total[1, 0] / self.training_seconds
        if self.finite.skipped is not None:
            figures["skipped_steps"] = self.finite.skipped.float()
        if self.finite.mode == "skip" and not total[1, 0]:
            raise UserError(
                f"No step of epoch {self.current_epoch} was finite; mend the images or the teacher, or lower "
                "learning_rate."
            )
        self._log_figures("train", figures)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the validation images."""
        self._finish_evaluation("val")
        self._since = perf_counter()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch of validation images."""
        self._evaluate(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch of test images."""
        self._evaluate(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the figures of the test images."""
        self._finish_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Prediction:
        """The most probable label of each image, and its probability."""
        images, _, *ids = batch if isinstance(batch, list | tuple) and len(batch) > 1 else (batch, None)
        probabilities, labels = self(images).float().softmax(1).max(1)
        return Prediction(ids[0] if ids else None, labels, probabilities)

    def teacher_logits(self, images: Tensor, batch_idx: int | None = None) -> Tensor | None:
        """What a teacher says of a batch, which has a number if it is of validation; ``None`` where there is none."""
        return None

    def _evaluate(self, batch: Any, batch_idx: int) -> None:
        images, labels, *_ = batch
        logits = self(images)
        self.num_classes = logits.shape[1]
        self._check_labels(labels)
        if self.evaluation is None:
            self.evaluation = Evaluation(logits.shape[1]).to(logits.device)
        self.evaluation.update(logits, labels, self.teacher_logits(images, batch_idx))

    def _check_labels(self, labels: Tensor) -> None:
        if labels.is_floating_point() or self.num_classes is None:
            return
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < -1 or high >= self.num_classes:
            raise UserError(
                f"Label {low if low < -1 else high} is outside [0, {self.num_classes}) (-1 means unlabelled); mend the "
                "labels, or give the network as many classes as the data have."
            )

    def _finish_evaluation(self, split: str) -> None:
        if self.evaluation is None:
            return
        figures = self.evaluation.compute()
        self.confusion = figures.pop("confusion", None)
        self._log_figures(split, figures)
        self.evaluation = None  # made anew in the mode (no_grad or inference) of the next evaluation

    def _log_figures(self, split: str, figures: dict[str, Tensor]) -> None:
        for name, value in figures.items():
            self.log(f"{split}/{name}", value, prog_bar=name == "accuracy", sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a network needs to be used elsewhere: statistics and class names, as plain data."""
        self.finite.settle(self)
        checkpoint[KEY] = FORMAT
        checkpoint["data_config"] = data_config(self.network)._asdict()
        if hasattr(self.network, "sliced_shapes"):  # it was pruned
            checkpoint["sliced_shapes"] = self.network.sliced_shapes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        if isinstance(checkpoint.get("sliced_shapes"), dict):
            slice_to(self.network, checkpoint["sliced_shapes"])
        self.network.data_config = DataConfig.of(**checkpoint.get("data_config", {}))  # type: ignore[assignment]
        if self._trainer is not None:
            self._match_data()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch, and weights of another network are refused in one sentence."""
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            if differing := state_dict_mismatch(self, state_dict):
                raise UserError(
                    f"The checkpoint does not fit this {type(self).__name__} ({differing}); build the network and the "
                    "losses that were saved."
                ) from error
            raise

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
        """Rebuild a module from a checkpoint as Lightning does, with two differences.

        The file is read as data: its checksums are compared, and it may name only networks, losses, optimizers and
        schedules of kd_lightning, torch, torchvision and modules that are already imported. A :class:`Checkpoint` that
        is open already is not read again.

        Raises:
            UserError: If the file is damaged, contains code, names anything else, or was saved from Python and the
                networks are not passed again.
        """
        return rebuild_module(
            cls,
            checkpoint_path,
            kwargs,
            network=cls.network_argument,
            map_location=map_location,
            hparams_file=hparams_file,
            strict=strict,
        )

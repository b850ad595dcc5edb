"""The base of all modules: optimizes, evaluates and saves one network."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_lightning.callbacks.data_check import DataCheck
from kd_lightning.callbacks.devices import check_device
from kd_lightning.callbacks.early_stop import EarlyStopReport
from kd_lightning.callbacks.epoch_metrics import EpochMetrics
from kd_lightning.callbacks.exact_resume import ExactResume
from kd_lightning.callbacks.finite_guard import FiniteGuard, StepRecord
from kd_lightning.callbacks.label_scores import LabelScores, decide, describe_unchosen
from kd_lightning.callbacks.out_of_memory import OutOfMemoryAdvice
from kd_lightning.callbacks.speed_report import SpeedReport
from kd_lightning.checkpoints import rebuild
from kd_lightning.checkpoints.io import use_atomic_checkpoints
from kd_lightning.checkpoints.trust import unserializable
from kd_lightning.data.batch import images_for_teacher
from kd_lightning.data.protocol import FollowsNetworks, is_image_data, is_multi_label
from kd_lightning.data.read_batch import read_batch, read_to_predict
from kd_lightning.features import logits_of
from kd_lightning.modules import optim
from kd_lightning.modules.acceleration import Acceleration
from kd_lightning.modules.class_weights import ClassWeights, build_class_weights, check_class_weights
from kd_lightning.modules.evaluation import LoaderEvaluations, Prediction
from kd_lightning.modules.example_images import example_images
from kd_lightning.modules.schedule import SchedulerFactory
from kd_lightning.networks.compiled import CompileMode, unwrap_compiled
from kd_lightning.networks.data_config import (
    DEFAULT_THRESHOLD,
    DataConfig,
    check_same_classes,
    check_same_kind,
    data_config,
    set_data_config,
    train_on,
)
from kd_lightning.networks.description import apply_description, describe_network
from kd_lightning.networks.dry_run import (
    check_initialized,
    check_precision,
    count_classes,
    describe_output,
    input_dtype,
    to_input_dtype,
    try_forward,
)
from kd_lightning.networks.input_conversion import InputConversion
from kd_lightning.networks.memory_format import overruns_channels_last
from kd_lightning.networks.weights import check_fits


class ClassificationModule(pl.LightningModule, ABC):
    """Optimizes, evaluates and saves the network under ``network``; a subclass defines ``training_step``.

    Batches are ``(images, labels)`` or ``(images, labels, ids)``, and what follows is ignored: images are floats
    ``(B, channels, H, W)``; labels are class indices, any integers ``(B,)`` or ``(B, 1)``, -1 where unlabelled, or
    class probabilities, floats ``(B, C)`` whose rows sum to 1. ``predict`` takes images without labels too.

    Where an image may have several classes, which the data module declares by ``multi_label = True``, labels are 1 for
    each class of an image and 0 for the others, ``(B, C)``. Classes are then learned one by one (sigmoid); thresholds
    of their probabilities are chosen on the first validation loader after each epoch, and saved with the network.

    Of several validation or test loaders the first has the metrics ``val/accuracy`` and so on, which callbacks and
    schedules follow; the next has ``val/accuracy/dataloader_idx_1`` and so on.

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
        compile: Compile the network, a teacher and the losses in place (no key of their state changes) in ``fit``:
            that takes up to some minutes in the first run, which kernels are kept of (``TORCHINDUCTOR_CACHE_DIR``), and
            the gain depends on the hardware. A network that ``torch.compile`` has wrapped is unwrapped, and compiled
            so; its mode and backend are not used.
        compile_mode: Mode of ``torch.compile``; ``None`` for ``"default"``.
        class_weights: Weights of the classes in the terms on labels, a number for each or ``"balanced"``: then a class
            counts as much as any other, however many training images it has. The loss is the weighted mean of rows.
            Where an image may have several classes, they are the factors of each class where it is present;
            ``"balanced"`` makes that count as much as where it is absent.
        on_nonfinite: Reaction to a loss or gradient that is not finite, before the weights are updated: ``"stop"``
            raises an error with the step, the term and the ranges, ``"skip"`` skips the update and counts it.
        cuda_graph: Capture the whole training step as a CUDA graph and replay it, so that small networks do not wait
            for Python: ``True``, or a sentence says why a run cannot; ``"auto"`` is off for now.

    Raises:
        UserError: If an argument is out of range, or the network has uninitialized layers.

    Example:
        >>> from kd_lightning import TeacherModule
        >>> from kd_lightning.networks import ResNet
        >>> module = TeacherModule(ResNet([1], [4], in_channels=1), learning_rate=0.05)
        >>> isinstance(module, ClassificationModule), module(torch.zeros(2, 1, 8, 8)).shape
        (True, torch.Size([2, 10]))
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
        compile_mode: CompileMode | None = None,
        class_weights: ClassWeights = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        cuda_graph: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        network, compiled = unwrap_compiled(network)
        check_initialized(network)
        self.network = network
        self.optimization = optim.Optimization(
            learning_rate, weight_decay, optimizer, lr_scheduler, lr_interval, lr_monitor
        )
        self.acceleration = Acceleration(compile or compiled, compile_mode, cuda_graph)
        check_class_weights(class_weights)
        self.given_class_weights = class_weights
        self.class_weights: Tensor | None = None
        self.convert_input = InputConversion()
        self.num_classes: int | None = None
        self.image_shape: tuple[int, ...] | None = None
        self.evaluations = LoaderEvaluations()
        self.confusion: Tensor | None = None
        self.label_scores: LabelScores | None = None
        self.epoch_metrics = EpochMetrics()
        self.finite_guard = FiniteGuard(on_nonfinite, self.epoch_metrics)
        self._all_labelled = False
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
        return images

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""

    def configure_callbacks(self) -> list[pl.Callback]:
        """Attach what watches the run; see each callback."""
        attached: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds = {type(callback) for callback in attached}
        watching = (ExactResume, OutOfMemoryAdvice, DataCheck, EarlyStopReport, SpeedReport)
        new = [kind() for kind in watching if kind not in kinds]
        own = [self.finite_guard, self.epoch_metrics]
        return [*new, *(callback for callback in own if callback not in attached)]

    def setup(self, stage: str) -> None:
        """Check network and data against each other before the first step."""
        check_device(self.trainer)
        if self.multi_label and self.optimization.lr_monitor == "val/accuracy":
            self.optimization = replace(self.optimization, lr_monitor="val/map")
        use_atomic_checkpoints(self.trainer.strategy)
        self._match_data()
        images = example_images(self.trainer, pairs=self.takes_pairs)
        if images is not None:
            self.dry_run(images)
        if stage == "fit" and self.compiles:
            self.acceleration.compile(self.network, getattr(self, "losses", None), self.data_module)
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
        for warning in describe_output(self.network, logits, trains=self.trainer.state.fn == "fit"):
            rank_zero_warn(warning)
        self.num_classes = count_classes(self.network, logits, getattr(self.data_module, "num_classes", None) or None)
        known = data_config(self.network)
        if self.multi_label and known.thresholds is None:  # of data that do not know their classes
            set_data_config(self.network, known._replace(thresholds=(DEFAULT_THRESHOLD,) * self.num_classes))

    def _first_forward(self, images: Tensor) -> Tensor:
        on_cpu = self.trainer.state.fn == "fit" and self.trainer.strategy.root_device.type == "cpu"
        self.convert_input.choose_memory_format(self.network, lambda: self(images), trains_on_cpu=on_cpu)
        return self(images)  # type: ignore[no-any-return]

    @property
    def data_module(self) -> object:
        """The data module of the trainer, if there is one."""
        return self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]

    @property
    def data(self) -> DataConfig:
        """The statistics and classes of the data module's images, and how they are prepared."""
        data = self.data_module
        known = {name: getattr(data, name, None) for name in DataConfig._fields}
        if self.multi_label and (count := getattr(data, "num_classes", None) or len(known["classes"] or ())):
            known["thresholds"] = (DEFAULT_THRESHOLD,) * count
        return DataConfig.of(**known)

    @property
    def multi_label(self) -> bool:
        """Return whether the data declare that an image may have several classes."""
        return is_multi_label(self.data_module)

    def known_inputs(self) -> dict[str, DataConfig]:
        """Return what the networks expect of their input, by name and in the order in which the data follow them."""
        return {"the network": data_config(self.network)}

    def _match_data(self) -> None:
        self.convert_input.match(self.network, self.data)
        if self.trainer.state.fn == "fit":
            train_on(self.network, self.data)
        else:
            check_same_classes("The network", data_config(self.network), self.data)
            if self.trainer.state.fn != "predict" and self.data_module is not None:
                check_same_kind("The network", data_config(self.network), multi_label=self.multi_label)

    def configure_optimizers(self) -> OptimizerConfig | OptimizerLRSchedulerConfig:
        """Return SGD with one cycle in steps, unless others are given."""
        return self.optimization.configure(self, self.network, self.trainer)

    @property
    def learning_rate(self) -> float | None:
        """The ``learning_rate`` of the constructor; Lightning's ``LearningRateFinder`` and ``Tuner`` set it."""
        return self.optimization.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.optimization = replace(self.optimization, learning_rate=rate)

    @property
    def all_labelled(self) -> bool:
        """The knowledge that every training image is labelled, which saves the search for rows that are not."""
        return self._all_labelled

    def on_train_start(self) -> None:
        """Determine whether every training image is labelled, the weights of the classes, and prepare a CUDA graph."""
        data = self.data_module
        self._all_labelled = is_image_data(data) and data.all_labelled
        weights = build_class_weights(self.given_class_weights, data, self.num_classes or 0)
        self.class_weights = None if weights is None else weights.to(self.device)
        self.acceleration.begin(self)

    def on_train_end(self) -> None:
        """Free a CUDA graph."""
        self.acceleration.end(self.data_module)

    def on_fit_start(self) -> None:
        """Train at the learning rate of the module, also if it was found after the optimizer was built."""
        self.acceleration.end(self.data_module)  # of a run that an error has ended
        optim.use_found_rate(self.trainer, self.learning_rate)
        self.acceleration.check_graph(self)

    @property
    def compiles(self) -> bool:
        """The choice to compile the network in ``fit``."""
        return self.acceleration.compiles

    def describe_speed(self) -> list[str]:
        """Return what makes the network fast, and what else could."""
        described = self.acceleration.describe(self)
        if self.convert_input.channels_last:
            return described
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        reason = (
            ", since its strided 1x1 convolutions of few channels crash in channels-last on CPUs"
            if on_cpu and overruns_channels_last(self.network)
            else " (reshape in place of view allows channels-last)"
        )
        return [*described, f"the network runs in contiguous memory{reason}"]

    def faster_steps(self) -> list[str]:
        """Return imperatives with the settings that may shorten training steps."""
        return [] if self.compiles else ["set model.compile to true for long runs"]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Prepare torch's fused SGD for updates that may be skipped."""
        if not self.acceleration.replayed:
            optim.init_momentum_buffers(optimizer)

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        """Compute the gradients, unless a CUDA graph has."""
        if not self.acceleration.replayed:
            super().backward(loss, *arguments, **options)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Forget the gradients of the last step, unless a CUDA graph has computed those of this one."""
        if not self.acceleration.replayed:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, unless the update is skipped: torch cannot clip by value without gradients."""
        if self.acceleration.replayed and not self.acceleration.capturing:
            return
        if any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"]):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # for the host: clocks and caches
    def log_step(
        self, loss: Tensor, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        """Add a batch to the epoch's means, show it to the finite guard, and log every ``log_every_n_steps``.

        Args:
            loss: The loss, a scalar.
            terms: Its unweighted terms by name.
            logits: Output of the trained network, ``(B, C)``.
            labels: Class indices ``(B,)`` or probabilities ``(B, C)``, or of several classes an image ``(B, C)``.
            tensors: Further tensors that the loss was computed from, whose ranges an error would report.
        """
        trainer, shown = self.trainer, {**tensors, "logits": logits}
        self.finite_guard.observe(
            StepRecord(trainer.current_epoch, trainer.global_step, {**terms, "loss": loss}, shown)
        )
        if self.multi_label:
            self.epoch_metrics.add(loss, terms, logits)
        else:
            self.epoch_metrics.add(loss, terms, logits, labels, all_labelled=self.all_labelled)
        if not self.acceleration.capturing:
            self.log_progress(loss)

    def log_progress(self, loss: Tensor) -> None:
        """Log the loss of a step and the learning rate every ``log_every_n_steps``."""
        trainer = self.trainer
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            self.log("train/loss_step", loss.detach(), prog_bar=True)
            self.log("learning_rate", trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of validation images."""
        self.evaluate(batch, batch_idx, dataloader_idx)
        sanity = self.trainer.sanity_checking
        counts = self.trainer.num_sanity_val_batches if sanity else self.trainer.num_val_batches
        if len(counts) > 1 and batch_idx + 1 == counts[dataloader_idx]:
            self.finish_evaluation("val", dataloader_idx, several=True)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation images."""
        if len(self.trainer.num_val_batches) == 1:
            self.finish_evaluation("val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of test images."""
        self.evaluate(batch, batch_idx, dataloader_idx)
        counts = self.trainer.num_test_batches
        if len(counts) > 1 and batch_idx + 1 == counts[dataloader_idx]:
            self.finish_evaluation("test", dataloader_idx, several=True)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test images."""
        if len(self.trainer.num_test_batches) == 1:
            self.finish_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Return the most probable label of each image, and its probability; or the decisions on several classes."""
        images, _, ids, _ = read_to_predict(batch)
        if (thresholds := data_config(self.network).thresholds) is not None:
            logits = self(images)
            return Prediction(ids, decide(logits, thresholds), logits.float().sigmoid())
        probabilities, labels = self(images).float().softmax(1).max(1)
        return Prediction(ids, labels, probabilities)

    def reference_logits(self, images: Tensor, batch_idx: int | None = None) -> Tensor | None:
        """Return logits ``(B, C)`` with which predictions are compared, a teacher's for example, or ``None``.

        Args:
            images: ``(B, channels, H, W)``.
            batch_idx: Number of the batch in the first loader of an evaluation, which is the same in each epoch.
        """
        return None

    @property
    def reference_thresholds(self) -> tuple[float, ...] | None:
        """The thresholds of what :meth:`reference_logits` returns, where an image may have several classes."""
        return None

    def evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of its loader."""
        loaded = read_batch(batch, multi_label=self.multi_label)
        logits = self(loaded.images)
        self.num_classes = logits.shape[1]
        reference = self.reference_logits(images_for_teacher(loaded), batch_idx if dataloader_idx == 0 else None)
        self.evaluations.update(dataloader_idx, logits, loaded.labels, reference, multi_label=self.multi_label)

    def finish_evaluation(self, split: str, dataloader_idx: int = 0, *, several: bool = False) -> dict[str, Tensor]:
        """Log and return the metrics of a loader, at the end of the epoch or, of several, in the last step of each.

        Only in steps does Lightning keep loaders apart: their results are separate, and their names get a suffix,
        here not those of the first one.
        """
        chooses = split == "val" and dataloader_idx == 0 and self.trainer.state.fn == "fit"
        found = self.evaluations.finish(
            dataloader_idx,
            thresholds=data_config(self.network).thresholds,
            teacher_thresholds=self.reference_thresholds,
            choose_thresholds=chooses and not self.trainer.sanity_checking,
        )
        metrics = found.values
        if dataloader_idx == 0:
            self.confusion, self.label_scores = found.confusion, found.scores
        if chooses and found.scores is not None and not self.trainer.sanity_checking:
            assert found.thresholds is not None
            self._keep_thresholds(found.thresholds)
        in_step = {"on_step": False, "on_epoch": True, "batch_size": 1, "add_dataloader_idx": dataloader_idx > 0}
        self.log_metrics(split, metrics, **(in_step if several else {}))
        return metrics

    def _keep_thresholds(self, thresholds: Tensor) -> None:
        """Attach the thresholds to the network; once, report the classes that have too few images to choose one."""
        known = data_config(self.network)
        set_data_config(self.network, known._replace(thresholds=tuple(thresholds.tolist())))
        line = describe_unchosen(self.label_scores, known.classes) if self.label_scores is not None else ""
        if line and self.trainer.current_epoch == 0:
            rank_zero_info(line)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, and nothing under ``Trainer(barebones=True)``, where it would warn in each step."""
        if not self.trainer.barebones:
            super().log(*args, **kwargs)

    def log_metrics(self, split: str, metrics: dict[str, Tensor], **options: Any) -> None:
        """Log the metrics of an epoch as ``split/name``; ``options`` are those of Lightning's ``log``."""
        for name, value in metrics.items():
            self.log(f"{split}/{name}", value, prog_bar=name in ("accuracy", "map"), sync_dist=True, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the network needs to be used elsewhere."""
        checkpoint.update(describe_network(self.network))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        apply_description(self.network, checkpoint)
        if self._trainer is not None:
            if isinstance(self.data_module, FollowsNetworks) and self.trainer.state.fn != "fit":
                self.data_module.follow_networks(self.known_inputs())
            self._match_data()
            if (
                self.image_shape is None
                and (images := example_images(self.trainer, pairs=self.takes_pairs)) is not None
            ):
                self.dry_run(images)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does; weights of another network raise one sentence."""
        with check_fits(self, state_dict):
            return super().load_state_dict(state_dict, strict, assign)

    load_from_checkpoint = classmethod(rebuild.load_from_checkpoint)  # type: ignore[assignment]

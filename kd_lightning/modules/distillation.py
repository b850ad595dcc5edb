"""Knowledge distillation."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from kd_lightning.callbacks.fetch_timer import CACHING, TEACHER, measured
from kd_lightning.callbacks.teacher_check import TeacherCheck
from kd_lightning.data.batch import LoadedBatch, images_for_teacher
from kd_lightning.data.protocol import is_image_data
from kd_lightning.data.read_batch import read_batch
from kd_lightning.errors import UserError
from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import (
    BinarySoftTargetLoss,
    BinaryTargetLoss,
    DistillationLoss,
    HardTargetLoss,
    Objective,
    SoftTargetLoss,
)
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.networks import data_config
from kd_lightning.networks.data_config import DataConfig, check_same_classes, check_same_kind, set_data_config
from kd_lightning.networks.dry_run import (
    describe_probabilities,
    input_dtype,
    returns_probabilities,
    to_input_dtype,
    try_forward,
)
from kd_lightning.teacher.frozen_teacher import FrozenTeacher
from kd_lightning.teacher.view_cache import check_cacheable


class DistillationModule(ClassificationModule):
    """Keeps a teacher frozen and trains a student on labels and on the teacher's outputs.

    The default objective is Hinton's, with ``alpha`` the weight of the teacher's term:

        (1 - alpha) * CE(labels, student) + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    Where an image may have several classes, which the data declare, its terms are ``BinaryTargetLoss`` and
    ``BinarySoftTargetLoss``, sums over the classes.

    G. Hinton, O. Vinyals, J. Dean: Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531

    Args:
        student: Network to train (``network`` in checkpoints).
        teacher: A trained network, of which the module keeps a frozen copy; only needed to fit, and only if a loss uses
            a teacher.
        temperature: T > 0; 4 unless ``losses`` are given, or 1 where an image may have several classes.
        alpha: Weight of the teacher's term, in [0, 1]; 0.9 unless ``losses`` are given.
        losses: Terms by name in place of ``temperature`` and ``alpha``, each with a weight of its own.
        teacher_check: Reaction, before the first step, to a teacher that is no better than chance on the validation
            images: ``"error"``, ``"warn"``, or ``"off"`` for no check.
        teacher_cache: Run the teacher once for each of the data module's V ``views`` of a training image and cache its
            logits: ``True`` in memory, or the path of a folder that serves further runs. Not for losses on features.
        **options: Arguments of :class:`ClassificationModule`.

    Raises:
        UserError: If an argument is out of range, ``losses`` are combined with ``temperature`` or ``alpha``, or a loss
            reads a layer that a network does not have.

    Example:
        >>> from kd_lightning.networks import resnet20, resnet56
        >>> module = DistillationModule(student=resnet20(), teacher=resnet56(), temperature=4.0, alpha=0.9)
        >>> {name: round(loss.weight, 2) for name, loss in module.losses.items()}
        {'hard': 0.1, 'soft': 0.9}
    """

    network_argument = "student"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        temperature: float | None = None,
        alpha: float | None = None,
        losses: dict[str, DistillationLoss] | None = None,
        teacher_check: Literal["error", "warn", "off"] = "error",
        teacher_cache: bool | str = False,
        **options: Any,
    ) -> None:
        super().__init__(student, **options)
        self._default = None if losses is not None else (temperature, alpha)
        self.losses = Objective(_terms(temperature, alpha, losses), accepts=(DistillationLoss,))
        self.teacher_check = TeacherCheck(teacher_check)
        self.teacher_cache = teacher_cache
        self._student_tap = FeatureTap(self.network, self.losses.layers, "student")
        self.frozen_teacher = None if teacher is None else FrozenTeacher(teacher, self.losses.teacher_layers)
        self._total_steps = math.inf

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.network

    @property
    def teacher(self) -> nn.Module | None:
        """The module's own frozen copy of the teacher, which is not a sub-module."""
        return None if self.frozen_teacher is None else self.frozen_teacher.network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted sum of the terms."""
        loaded = read_batch(batch, multi_label=self.multi_label)
        images, labels = loaded.images, loaded.labels
        student = self._student_tap(self.network_input(images))
        teacher = self._teacher_outputs(loaded)
        loss: Tensor
        loss, terms = self.losses(student, teacher, labels)
        inputs = {"images": images} if teacher is None else {"images": images, "the teacher's logits": teacher.logits}
        self.log_step(loss, terms, student.logits, labels, inputs)
        return loss

    def _teacher_outputs(self, batch: LoadedBatch) -> Outputs | None:
        if self.frozen_teacher is None:
            return None
        # a graph has no clock inside
        with nullcontext() if self.acceleration.capturing else measured(self.trainer, TEACHER):
            return self.frozen_teacher(images_for_teacher(batch), batch.ids)

    def reference_logits(self, images: Tensor, batch_idx: int | None = None) -> Tensor | None:
        """Return the teacher's logits ``(B, C)`` of images at its size, or ``None`` if it has other classes."""
        if self.frozen_teacher is None:
            return None
        if batch_idx is None or self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            logits = self.frozen_teacher(images).logits
        else:
            logits = self.frozen_teacher.cached_val_logits(batch_idx, images)
        return logits if logits.shape[1] == self.num_classes else None

    @property
    def reference_thresholds(self) -> tuple[float, ...] | None:
        """The thresholds of the teacher, where an image may have several classes."""
        return None if self.teacher is None else data_config(self.teacher).thresholds

    @property
    def learns_without_labels(self) -> bool:  # type: ignore[override]
        """Return whether a loss compares the student with a teacher."""
        return self.losses.needs_teacher

    @property
    def shares_classes(self) -> bool:
        """Return whether teacher and student have the same number of classes."""
        shapes = self.losses.shapes
        return shapes is None or shapes[1] is None or shapes[1]["logits"] == shapes[0]["logits"]  # type: ignore[index]

    def configure_callbacks(self) -> list[pl.Callback]:
        """Attach the teacher's check too."""
        attached: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [*super().configure_callbacks(), *([] if self.teacher_check in attached else [self.teacher_check])]

    def setup(self, stage: str) -> None:
        """Check both networks, the losses and the data against each other before the first step."""
        self._match_losses(stage)
        if stage == "fit" and self.teacher is None and self.losses.needs_teacher:
            raise UserError("DistillationModule needs a teacher to fit; pass teacher=..., a trained network.")
        if stage == "fit":
            self.losses.check_views(getattr(self.data_module, "views_in_batch", 1))
        if self.teacher is None:
            rank_zero_info("There is no teacher, so agreement with it is not measured.")
        super().setup(stage)
        # DDP would broadcast these before every step: queues, which are equal already, and the statistics of
        # regressors, which are only read for a batch of one image
        buffers = [name for name, _ in self.losses.named_buffers(prefix="losses")]
        self._ddp_params_and_buffers_to_ignore = buffers

    def _match_losses(self, stage: str) -> None:
        """Choose the default objective for one class an image or several; other losses must be for such data."""
        self._choose_default(multi_label=self.multi_label)
        if stage != "fit":
            return
        self.losses.check_labels(multi_label=self.multi_label)
        if self.multi_label and self._default is not None:
            weights = ", ".join(f"{type(term).__name__} ({term.weight:g})" for term in self.losses.terms.values())
            rank_zero_info(f"An image may have several classes, so the student learns by {weights}.")

    def _choose_default(self, *, multi_label: bool) -> None:
        if self._default is not None and self.losses.terms_for_other_labels(multi_label=multi_label):
            terms = _terms(*self._default, None, multi_label=multi_label)
            self.losses = Objective(terms, accepts=(DistillationLoss,))

    def dry_run(self, images: Tensor) -> None:
        """Run both networks once; build the learned parts of the losses.

        Args:
            images: ``(2, channels, H, W)``.

        Raises:
            UserError: If the teacher returns NaN, or an output does not fit a loss.
        """
        super().dry_run(images)
        if self.frozen_teacher is None and self.losses.needs_teacher:
            return
        images = to_input_dtype(images, self.network)
        inputs = self.network_input(images)
        if self._student_tap.layers:
            self._student_tap.find_channels_last(inputs)
        student = try_forward(self, lambda: self._student_tap(inputs), "The student", images)
        if self._student_tap.layers:
            self._student_tap.check_not_overwritten(inputs)
        teacher = None
        if self.frozen_teacher is not None:
            teacher = self._dry_run_teacher(self.frozen_teacher, self._at_teacher_size(images))
        self.losses.build(student, teacher, network=self.network, teacher=self.teacher)

    def _dry_run_teacher(self, teacher: FrozenTeacher, images: Tensor) -> Outputs:
        images = images.to(input_dtype(teacher.network))
        try_forward(self, lambda: teacher.prepare(images), "The teacher", images, teacher.network)
        outputs = try_forward(self, lambda: teacher(images), "The teacher", images, teacher.network)
        if returns_probabilities(outputs.logits):
            rank_zero_warn(describe_probabilities("The teacher"))
        if bool(images.isfinite().all()) and not bool(outputs.logits.isfinite().all()):
            raise UserError("The teacher's logits are not finite (NaN or infinity); its weights are damaged.")
        if teacher.tap.layers:
            teacher.tap.check_not_overwritten(teacher.convert_input(images))
        return outputs

    def known_inputs(self) -> dict[str, DataConfig]:
        """Return what the student, or else the teacher, expects of its input."""
        known = super().known_inputs()
        return known if self.teacher is None else {**known, "the teacher": data_config(self.teacher)}

    def _at_teacher_size(self, images: Tensor) -> Tensor:
        """Return random images of the size that the data module yields for the teacher, or the images themselves."""
        shape = getattr(self.data_module, "teacher_shape", None)
        if shape is None:
            return images
        return torch.randn(len(images), *shape, generator=torch.Generator().manual_seed(0)).to(images)

    def _match_data(self) -> None:
        """Match the teacher's input with the data too."""
        super()._match_data()
        if self.frozen_teacher is None:
            return
        known, data = data_config(self.frozen_teacher.network), self.data
        self.frozen_teacher.convert_input.match(self.frozen_teacher.network, data)
        if known.mean is None and data.mean is not None and self.losses.shapes is None:
            rank_zero_warn(
                "The mean and deviation of the images that the teacher was trained on are not known; those of the data "
                "are assumed. If they differ, give mean and std to from_checkpoint, or set data.mean and data.std."
            )
        if self.losses.compares_logits:
            check_same_classes("The teacher", known, data)
            if self.trainer.state.fn == "fit":
                check_same_kind("The teacher", known, multi_label=self.multi_label)
            own = data_config(self.network)
            if self.trainer.state.fn == "fit" and not own.classes:  # unlabelled images have no classes of their own
                set_data_config(self.network, own._replace(classes=known.classes))

    def on_fit_start(self) -> None:
        """Optimize the teacher for inference, and open its cache."""
        super().on_fit_start()
        if self.frozen_teacher is None:
            return
        images = torch.randn(4, *(self.image_shape or ()), generator=torch.Generator().manual_seed(0))
        images = self._at_teacher_size(images)
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None  # otherwise as the student
        self.frozen_teacher.optimize_for_inference(
            to_input_dtype(images, self.network),
            dtype,
            (self.acceleration.mode or "default") if self.compiles else None,
            fixed_shapes=is_image_data(self.data_module),
        )
        if self.teacher_cache is not False:
            self._open_cache(self.frozen_teacher, self.teacher_cache)

    def _open_cache(self, teacher: FrozenTeacher, where: bool | str) -> None:
        reading = next((name for name, loss in self.losses.items() if loss.teacher_layers), None)
        if reading is not None:
            raise UserError(
                f"The teacher's logits cannot be cached: the loss {reading!r} reads the teacher's layers, which are "
                "not cached, or set teacher_cache=False."
            )
        data = check_cacheable(self.data_module, "The teacher's logits", "teacher_cache")
        shapes = self.losses.shapes
        assert shapes is not None
        assert shapes[1] is not None
        teacher.enable_cache(data, shapes[1]["logits"][1], where, str(self.trainer.precision))

    def on_train_start(self) -> None:
        """Determine the number of steps, for terms that depend on the progress."""
        self._total_steps = max(float(self.trainer.estimated_stepping_batches), 1.0)
        super().on_train_start()
        self.losses.begin_training(all_labelled=self.all_labelled, class_weights=self.class_weights)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the progress of the losses, and load the view of the epoch from the cache, or fill it."""
        progress = self.trainer.global_step / self._total_steps
        self.losses.begin_step(progress=progress, epoch=self.current_epoch, device=self.device)
        teacher = self.frozen_teacher
        if teacher is None or teacher.cache is None or teacher.cache.shows(self.current_epoch):
            return
        with self.epoch_metrics.paused(), measured(self.trainer, CACHING):
            teacher.load_view(self.current_epoch, self.trainer)

    def describe_speed(self) -> list[str]:
        """Return what makes the networks fast, and what else could."""
        return [*super().describe_speed(), *([] if self.frozen_teacher is None else self.frozen_teacher.speed())]

    def faster_steps(self) -> list[str]:
        """Return imperatives with the settings that may shorten training steps: first the teacher's cache."""
        teacher, data = self.frozen_teacher, self.data_module
        if teacher is None or teacher.cache is not None or teacher.tap.layers or not hasattr(data, "view_dataloader"):
            return super().faster_steps()
        cached = "cache the teacher's logits (data.views with model.teacher_cache true), since it runs in each step"
        return [cached, *super().faster_steps()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the shapes from which the learned parts of the losses are rebuilt."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["loss_shapes"] = self.losses.shapes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the learned parts of the losses, so that their weights can be loaded."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None:  # else the data say it
            self._choose_default(multi_label=data_config(self.network).thresholds is not None)
        shapes = checkpoint.get("loss_shapes")
        self.losses.load_shapes(shapes, network=self.network, teacher=self.teacher)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationModule":
        """Move the teacher along when the module is moved or cast (torch's hook for ``to``): it is not a sub-module."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frozen_teacher is not None:
            self.frozen_teacher.move(fn)
        return self


def _terms(
    temperature: float | None,
    alpha: float | None,
    losses: Mapping[str, DistillationLoss] | None,
    *,
    multi_label: bool = False,
) -> Mapping[str, DistillationLoss]:
    if losses is not None and (temperature is not None or alpha is not None):
        raise UserError("Give either losses, each with its own weight, or temperature and alpha; not both.")
    if losses is None:
        alpha = 0.9 if alpha is None else alpha
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha, the weight of the teacher's term, must be in [0, 1], got {alpha}.")
        if multi_label:
            binary = BinarySoftTargetLoss(1.0 if temperature is None else temperature, weight=alpha)
            return {"hard": BinaryTargetLoss(weight=1 - alpha), "soft": binary}
        soft = SoftTargetLoss(4.0 if temperature is None else temperature, weight=alpha)
        return {"hard": HardTargetLoss(weight=1 - alpha), "soft": soft}
    return losses

"""Knowledge distillation."""

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from kd_lightning.callbacks.teacher_check import accuracy_on_val, refuse_guessing
from kd_lightning.checkpoints.trust import unserializable
from kd_lightning.errors import UserError
from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import DistillationLoss, HardTargetLoss, Objective, SoftTargetLoss
from kd_lightning.modules.classification import ClassificationModule, OptimizerFactory, SchedulerFactory
from kd_lightning.networks import data_config
from kd_lightning.networks.data_config import check_same_classes
from kd_lightning.networks.dry_run import try_forward
from kd_lightning.networks.normalization import normalization_between
from kd_lightning.networks.placement import weight_device
from kd_lightning.teacher.frozen_teacher import FrozenTeacher
from kd_lightning.teacher.view_cache import uncacheable_reason


class DistillationModule(ClassificationModule):
    """Holds a teacher frozen and trains a student on labels and on what the teacher says.

    By default the objective is Hinton's, with ``alpha`` the share of the teacher:

        (1 - alpha) * CE(labels, student) + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    G. Hinton, O. Vinyals, J. Dean: Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531

    Args:
        student: The network that is trained (``network`` in checkpoints).
        teacher: A trained network; the module keeps a frozen copy. Needed to fit only, if a loss compares with it.
        temperature: T > 0; 4 unless ``losses`` are given.
        alpha: In [0, 1]; 0.9 unless ``losses`` are given.
        losses: Terms by name instead of ``temperature`` and ``alpha``, each with a weight of its own.
        teacher_check: What happens before the first step if the teacher is no better than chance on the validation
            images: ``"error"``, ``"warn"``, or ``"off"`` to leave the look out.
        learning_rate: Peak of the default schedule.
        weight_decay: Of the default optimizer; norms and biases are left out.
        optimizer: See :class:`TeacherModule`.
        lr_scheduler: See :class:`TeacherModule`.
        lr_interval: See :class:`TeacherModule`.
        teacher_cache: Ask the teacher once about each of the data module's V ``views`` of a training image and keep
            its logits: ``True`` in memory, or the path of a folder that serves further runs. Not for losses on
            features.
        compile: See :class:`TeacherModule`.
        on_nonfinite: See :class:`TeacherModule`.

    Raises:
        ValueError: If an argument lies outside its range, ``losses`` come together with ``temperature`` or ``alpha``,
            or a loss reads a layer that a network does not have.

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
        temperature: float | None = None,
        alpha: float | None = None,
        losses: dict[str, DistillationLoss] | None = None,
        teacher_check: Literal["error", "warn", "off"] = "error",
        learning_rate: float = 0.1,
        weight_decay: float = 5e-4,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["step", "epoch"] = "epoch",
        teacher_cache: bool | str = False,
        compile: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__(
            student, learning_rate, weight_decay, optimizer, lr_scheduler, lr_interval, compile, on_nonfinite
        )
        self.losses = Objective(_terms(temperature, alpha, losses), accepts=(DistillationLoss,))
        self.teacher_check = teacher_check
        self.teacher_cache = teacher_cache
        self._student_tap = FeatureTap(student, self.losses.layers, "student")
        self._frozen_teacher = None if teacher is None else FrozenTeacher(teacher, self.losses.teacher_layers)
        self._total_steps = math.inf
        self.save_hyperparameters(ignore=unserializable("student", "teacher", "losses", "optimizer", "lr_scheduler"))

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.network

    @property
    def teacher(self) -> nn.Module | None:
        """The module's own frozen copy; no sub-module."""
        return None if self._frozen_teacher is None else self._frozen_teacher.network

    def _apply(self, fn: Any, recurse: bool = True) -> "DistillationModule":
        """What moves the module to a device or a type moves the teacher along (the one override of torch's)."""
        super()._apply(fn, recurse)
        if self._frozen_teacher is not None:
            self._frozen_teacher.move(fn)
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the weighted sum of the terms."""
        images, labels, *ids = batch
        progress = self.trainer.global_step / self._total_steps
        self.losses.begin_step(progress=progress, epoch=self.current_epoch, device=images.device)
        student = self._student_tap(self.convert_input(images))
        teacher: Outputs | None = None if self._frozen_teacher is None else self._frozen_teacher(images, *ids)
        loss, values = self.losses(student, teacher, labels)
        inputs = {"images": images} if teacher is None else {"images": images, "the teacher's logits": teacher.logits}
        self.record(loss, values, student.logits, labels, inputs)
        return loss

    def teacher_logits(self, images: Tensor, batch_idx: int | None = None) -> Tensor | None:
        """What the teacher says of a batch, ``(B, C)``; nothing where it knows other classes."""
        if self._frozen_teacher is None:
            return None
        if batch_idx is None or self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            logits = self._frozen_teacher(images).logits
        else:
            logits = self._frozen_teacher.cached_val_logits(batch_idx, images)
        return logits if logits.shape[1] == self.num_classes else None

    @property
    def _teach(self) -> FrozenTeacher:
        assert self._frozen_teacher is not None
        return self._frozen_teacher

    def setup(self, stage: str) -> None:
        """Check both networks, the losses and the data against each other before the first step."""
        if stage == "fit" and self.teacher is None and self.losses.needs_teacher:
            raise UserError("DistillationModule needs a teacher to fit; pass teacher=..., a trained network.")
        if self.teacher is None:
            rank_zero_info("There is no teacher, so agreement with it is not measured.")
        super().setup(stage)
        # DDP would send these from rank to rank before every step: queues, which are the same already, and the
        # statistics of regressors, which are read for a batch of one image at the most
        buffers = [name for name, _ in self.losses.named_buffers(prefix="losses")]
        self._ddp_params_and_buffers_to_ignore = buffers

    def dry_run(self, images: Tensor) -> None:
        """Run both networks once; build the learned parts of the losses.

        Args:
            images: ``(2, channels, H, W)``.

        Raises:
            ValueError: If the teacher says NaN, or knows other classes than the student where a loss compares logits.
        """
        super().dry_run(images)
        if self.teacher is None and self.losses.needs_teacher:
            return
        images = self._to_input_dtype(images)
        self._image_shape = images.shape[1:]
        student = try_forward(self, lambda: self._student_tap(self.convert_input(images)), "The student", images)
        if self._student_tap.layers:
            self._student_tap.check_not_overwritten(self.convert_input(images))
        teacher = None if self.teacher is None else self._dry_run_teacher(images)
        device = weight_device(self.network)
        self.losses.build(student, teacher, network=self.network, teacher=self.teacher, device=device)

    def _dry_run_teacher(self, images: Tensor) -> Outputs:
        teacher = try_forward(self, lambda: self._teach(images), "The teacher", images)
        if bool(images.isfinite().all()) and not bool(teacher.logits.isfinite().all()):
            raise UserError("The teacher's logits are not finite (NaN or infinity); its weights are damaged.")
        if self._teach.tap.layers:
            self._teach.tap.check_not_overwritten(self._teach.convert_input(images))
        return teacher

    def _match_data(self) -> None:
        super()._match_data()
        if self.teacher is None:
            return
        known, data = data_config(self.teacher), self.data
        self._teach.convert_input = normalization_between(data, known).to(weight_device(self._teach.network))
        if known.mean is None and data.mean is not None and self.losses.shapes is None:
            rank_zero_info("The teacher's input statistics are not known; those of the data are assumed.")
        if self.losses.compares_logits:
            check_same_classes("The teacher", known, data)

    def on_train_start(self) -> None:
        """Optimize the teacher for inference, and evaluate it once before anything is learned from it."""
        steps = float(self.trainer.estimated_stepping_batches)
        self._total_steps = steps if steps > 0 else math.inf  # a stream has no length
        if self._frozen_teacher is None:
            super().on_train_start()
            return
        images = torch.randn(4, *self._image_shape, generator=torch.Generator().manual_seed(0))
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None  # else as the student is
        self._teach.optimize_for_inference(self._to_input_dtype(images), dtype, self.compiles)
        if self.teacher_cache is not False:
            self._open_cache(self.teacher_cache)
        super().on_train_start()
        if self.teacher_check == "off" or self.trainer.global_step > 0:
            return
        if not self._same_classes():
            rank_zero_info("The teacher knows other classes than the data, so its accuracy is not looked at.")
            return
        right, count = accuracy_on_val(self.trainer, lambda images: self._teach(images).logits)
        if not count:
            rank_zero_info("There are no labelled validation images to check the teacher on.")
            return
        rank_zero_info(f"The teacher's accuracy on the validation images is {right / count:.2%}.")
        if self.trainer.is_global_zero and self.logger is not None:
            self.logger.log_metrics({"teacher/accuracy": right / count}, step=0)
        reason = refuse_guessing(right, count, self.num_classes or 1)
        if reason and self.teacher_check == "error":
            raise UserError(reason)
        if reason:
            rank_zero_warn(reason)

    def speed(self) -> list[str]:
        """What makes the training quick, and what would."""
        return [*super().speed(), *(self._frozen_teacher.speed() if self._frozen_teacher else [])]

    def _open_cache(self, where: bool | str) -> None:
        data = self._datamodule
        terms = {n: loss for n, loss in self.losses.terms.items() if isinstance(loss, DistillationLoss)}
        reading = next((name for name, loss in terms.items() if loss.teacher_layers), None)
        features = None if reading is None else f"the loss {reading!r} reads the teacher's features, which are not kept"
        reason = features or uncacheable_reason(data)
        if reason is not None:
            raise UserError(f"The teacher's logits cannot be cached: {reason}, or set teacher_cache=False.")
        _, teacher = self._logit_shapes()
        self._teach.enable_cache(data, teacher[1], where, str(self.trainer.precision))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Show the view of this epoch in the cache, once it is whole."""
        super().on_train_batch_start(batch, batch_idx)
        teacher = self._frozen_teacher
        if teacher is not None and teacher.cache is not None and teacher.load_view(self.current_epoch, self.trainer):
            self._since = perf_counter()

    def _same_classes(self) -> bool:
        if self.losses.shapes is None:
            return True
        student, teacher = self._logit_shapes()
        return student[1:] == teacher[1:]

    def _logit_shapes(self) -> tuple[list[int], list[int]]:
        student, teacher = self.losses.shapes or (None, None)
        assert student is not None
        assert teacher is not None
        return student["logits"], teacher["logits"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the shapes from which the learned parts of the losses are rebuilt."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["loss_shapes"] = self.losses.shapes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the learned parts of the losses, so that their weights can be loaded."""
        super().on_load_checkpoint(checkpoint)
        shapes, device = checkpoint.get("loss_shapes"), weight_device(self.network)
        self.losses.load_shapes(shapes, network=self.network, teacher=self.teacher, device=device)


def _terms(
    temperature: float | None, alpha: float | None, losses: Mapping[str, DistillationLoss] | None
) -> Mapping[str, DistillationLoss]:
    if losses is not None and (temperature is not None or alpha is not None):
        raise UserError("Give either losses, each with its own weight, or temperature and alpha; not both.")
    if losses is None:
        alpha = 0.9 if alpha is None else alpha
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha, the weight of the teacher's term, must lie in [0, 1], got {alpha}.")
        soft = SoftTargetLoss(4.0 if temperature is None else temperature, weight=alpha)
        return {"hard": HardTargetLoss(weight=1 - alpha), "soft": soft}
    return losses

"""The objective of a module: named terms and their weighted sum."""

import math
from collections.abc import Mapping
from itertools import chain
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Features, Grid, Outputs
from kd_lightning.losses._precision import widen
from kd_lightning.losses.base import AlignmentLoss, DistillationLoss
from kd_lightning.networks.placement import weight_device

Loss = DistillationLoss | AlignmentLoss
_LOGGED = {"loss", "loss_step", "accuracy", "images_per_second", "waiting_for_data", "skipped_steps"}


class Shapes(TypedDict):
    """The shapes of a network's outputs as plain data, which a checkpoint may hold."""

    logits: list[int]
    features: dict[str, list[int]]
    grids: NotRequired[dict[str, list[int]]]


class Objective(nn.ModuleDict):
    r"""The weighted sum of named terms of one pair of outputs: student and teacher, or source and target.

    .. math:: L = \sum_k w_k(e) \, L_k

    with the weights of epoch e, see :meth:`Term.weight_at`. Learned parts of the terms are created from the shapes of a
    dry run (:meth:`build`), which a checkpoint keeps (:attr:`shapes`, :meth:`load_shapes`).

    Args:
        losses: Terms by name; the names are those under which they are logged.
        accepts: Kinds of terms that the module can compute.
        views: Number of views of each image in the module's batches; ``None`` where any number may come.

    Raises:
        ValueError: If no term has a weight above 0, a name cannot be used, a term is not of an accepted kind, or it
            expects more views than there are.

    Example:
        >>> from kd_lightning.losses import HardTargetLoss, SoftTargetLoss
        >>> losses = {"hard": HardTargetLoss(weight=0.5), "soft": SoftTargetLoss(1.0, weight=2.0)}
        >>> objective = Objective(losses, accepts=(DistillationLoss,))
        >>> student, teacher = Outputs(torch.zeros(1, 2)), Outputs(torch.zeros(1, 2))
        >>> objective(student, teacher, torch.tensor([0]))
        (tensor(0.3466), {'hard': tensor(0.6931), 'soft': tensor(0.)})
    """

    def __init__(
        self, losses: Mapping[str, Loss], *, accepts: tuple[type[Loss], ...], views: int | None = None
    ) -> None:
        super().__init__()
        self._shapes: tuple[Shapes, Shapes | None] | None = None
        # plain attributes and no buffers: a module that is cast to bfloat16 would round buffers, and DDP would send
        # and checkpoints would hold them
        self._progress = torch.zeros(())
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._current_epoch = 0
        self._weights = torch.zeros(0)
        self._current_weights: list[float] = []
        self._check(losses, accepts, views)
        self.update(losses)

    def _check(self, losses: Mapping[str, Loss], accepts: tuple[type[Loss], ...], views: int | None) -> None:
        if not losses or not math.fsum(loss.weight for loss in losses.values()) > 0:
            raise UserError("losses must name at least one term with a weight above 0.")
        for name, loss in losses.items():
            if not name.isidentifier() or hasattr(self, name):
                raise UserError(f"A loss cannot be called {name!r}; choose a plain word that torch does not use.")
            if name in _LOGGED:
                raise UserError(f"A loss cannot be called {name!r}, which is logged already; choose another name.")
            if not isinstance(loss, accepts):
                domains = isinstance(loss, AlignmentLoss)
                compared = "two domains, not two networks" if domains else "two networks, not two domains"
                raise UserError(
                    f"The loss {name!r} ({type(loss).__name__}) compares {compared}; "
                    f"use it in {'AdaptationModule' if domains else 'DistillationModule'}."
                )
            if views is not None and loss.views > views:
                raise _too_few_views(name, loss, views)

    @property
    def terms(self) -> dict[str, Loss]:
        """The terms by name."""
        return cast("dict[str, Loss]", dict(self.items()))

    @property
    def layers(self) -> list[str]:
        """The layers of the trained network that terms read, each once."""
        read = [t.layers if isinstance(t, AlignmentLoss) else t.student_layers for t in self.terms.values()]
        return list(dict.fromkeys(chain.from_iterable(read)))

    @property
    def teacher_layers(self) -> list[str]:
        """The layers of the teacher that terms read, each once."""
        read = [term.teacher_layers for term in self.terms.values() if isinstance(term, DistillationLoss)]
        return list(dict.fromkeys(chain.from_iterable(read)))

    @property
    def needs_teacher(self) -> bool:
        """Return whether a term reads a teacher's outputs."""
        return any(term.needs_teacher for term in self.terms.values())

    @property
    def capturable(self) -> bool:
        """Return whether a compiler, or a CUDA graph, can hold all terms."""
        return all(term.capturable for term in self.terms.values())

    @property
    def compares_logits(self) -> bool:
        """Return whether a term compares logits, so that both networks need the same classes."""
        return any(term.compares_logits for term in self.terms.values())

    @property
    def views(self) -> int:
        """The largest number of views of each image that a term expects from the data."""
        return max(term.views for term in self.terms.values())

    def check_views(self, views: int) -> None:
        """Check that batches have as many views of each image as the terms expect.

        Args:
            views: Number of views of each image in a batch.

        Raises:
            ValueError: If a term expects more; the message names it.
        """
        for name, term in self.terms.items():
            if term.views > views:
                raise _too_few_views(name, term, views)

    def terms_for_other_labels(self, *, multi_label: bool) -> dict[str, Loss]:
        """Return the terms, by name, that are for images of one class where these have several, or the other way."""
        return {name: term for name, term in self.terms.items() if term.multi_label == (not multi_label)}

    def check_labels(self, *, multi_label: bool) -> None:
        """Check that the terms are for images of several classes, or for those of one class.

        Args:
            multi_label: Whether the data declare that images may have several classes.

        Raises:
            ValueError: If a term is for the other kind of data; the message names all that are.
        """
        wrong = self.terms_for_other_labels(multi_label=multi_label)
        if not wrong:
            return
        instead = ("BinaryTargetLoss", "BinarySoftTargetLoss") if multi_label else ("HardTargetLoss", "SoftTargetLoss")
        found = " and ".join(f"{name!r} ({type(term).__name__})" for name, term in wrong.items())
        used = " and ".join(dict.fromkeys(instead[term.needs_teacher] for term in wrong.values()))
        flags = " ".join(f"--model.losses.{name}={instead[term.needs_teacher]}" for name, term in wrong.items())
        subject, place = (f"loss {found} is", "its") if len(wrong) == 1 else (f"losses {found} are", "their")
        kinds = ("several classes", "one class") if multi_label else ("one class", "several classes")
        declare = "" if multi_label else ", or let the data declare multi_label if they have several"
        raise UserError(
            f"The {subject} for images of {kinds[1]}, but the data have {kinds[0]} an image; use {used} in {place} "
            f"place ({flags}){declare}."
        )

    @property
    def shapes(self) -> list[Shapes | None] | None:
        """The shapes for which the learned parts were created, as plain data; ``None`` before :meth:`build`."""
        return None if self._shapes is None else list(self._shapes)

    def build(
        self,
        first: Outputs,
        second: Outputs | None,
        *,
        network: nn.Module,
        teacher: nn.Module | None = None,
    ) -> None:
        """Check that the outputs fit the terms, and create the terms' learned parts once.

        Args:
            first: Outputs of a dry run for the student, or the source.
            second: Outputs for the teacher, or the target; ``None`` where no term needs a teacher.
            network: The network that is trained, on whose device the learned parts are created.
            teacher: The frozen teacher.

        Raises:
            ValueError: If a layer's output does not fit its term, or a term compares the logits of different classes.
        """
        shapes = _shapes_of(first), None if second is None else _shapes_of(second)
        self._check_outputs(*shapes)
        if self._shapes is None:
            self._build(*shapes, network, teacher)

    def load_shapes(
        self,
        shapes: list[Shapes | None] | None,
        *,
        network: nn.Module,
        teacher: nn.Module | None = None,
    ) -> None:
        """Create the learned parts for a checkpoint's :attr:`shapes`, if there are any, so that weights can be loaded.

        Args:
            shapes: A checkpoint's shapes; ``None`` where it has none.
            network: The network that is trained, on whose device the learned parts are created.
            teacher: The frozen teacher.
        """
        if shapes is not None and self._shapes is None:
            first, second = shapes
            assert first is not None
            self._build(first, second, network, teacher)

    def _check_outputs(self, first: Shapes, second: Shapes | None) -> None:
        for name, term in self.terms.items():
            if term.compares_logits and second is not None and first["logits"] != second["logits"]:
                raise UserError(
                    f"The teacher has {second['logits'][1]} classes and the student {first['logits'][1]}, but the "
                    f"loss {name!r} compares their logits; use networks of the same classes, or losses on features."
                )
            term.check(_zeros(first), _zeros(second))

    def _build(
        self,
        first: Shapes,
        second: Shapes | None,
        network: nn.Module,
        teacher: nn.Module | None,
    ) -> None:
        self._shapes = first, second
        for term in self.terms.values():
            outputs = _zeros(first), _zeros(second)
            if isinstance(term, AlignmentLoss):
                term.build(*outputs, network=network)
            else:
                term.build(*outputs, student_network=network, teacher_network=teacher)
            term.to(weight_device(network))

    def begin_training(self, *, all_labelled: bool, class_weights: Tensor | None = None) -> None:
        """Let the terms know whether every training image is labelled, and how much each class counts.

        Args:
            all_labelled: Whether every training image is labelled.
            class_weights: Factor of each class, ``(C,)``, on the device of the logits; equal by default.

        Raises:
            UserError: If there are class weights that no term uses.
        """
        if class_weights is not None and not any(term.weighs_classes for term in self.terms.values()):
            raise UserError(
                "class_weights weigh the rows of HardTargetLoss, and no loss is one; add it, or leave them out."
            )
        for term in self.terms.values():
            term.all_labelled = all_labelled
            term.class_weights = class_weights

    def begin_step(self, *, progress: float, epoch: int, device: torch.device) -> None:
        """Set the terms' progress, epoch and weights, in place; nothing waits for the device.

        Args:
            progress: Fraction of the training that is done, in [0, 1].
            epoch: The current epoch, from 0.
            device: Device of the batches.
        """
        if self._progress.device != device:
            self._progress, self._epoch = self._progress.to(device), self._epoch.to(device)
        self._progress.fill_(progress)
        if epoch != self._current_epoch:
            self._epoch.fill_(epoch)
            self._current_epoch = epoch
        weights = [term.weight_at(epoch) for term in self.terms.values()]
        if weights != self._current_weights and len(self._weights) == len(weights):
            self._weights.copy_(torch.tensor(weights, dtype=self._weights.dtype))
            self._current_weights = weights
        for term in self.terms.values():
            term.progress, term.epoch = self._progress, self._epoch

    def forward(self, first: Outputs, second: Outputs | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of the terms.

        Args:
            first: Outputs of the student, or for the source.
            second: Outputs of the teacher, or for the target.
            labels: Class indices ``(B,)``, -1 where unlabelled, or class probabilities ``(B, C)``.

        Returns:
            The sum, a scalar; and the values to log by name: the unweighted terms and their metrics.
        """
        first = first._replace(logits=widen(first.logits))  # once for all terms
        values = {name: term(first, second, labels) for name, term in self.terms.items()}
        stacked = torch.stack(list(values.values()))
        loss = (stacked * self._weights_for(stacked)).sum()
        metrics = {f"{name}_{m}": value.detach() for name, t in self.terms.items() for m, value in t.metrics.items()}
        return loss, {**values, **metrics}

    def _weights_for(self, values: Tensor) -> Tensor:
        """Return the weights on the device, where :meth:`begin_step` changes them."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        stale = self._weights
        if stale.device != values.device or stale.dtype != dtype or stale.shape != values.shape:
            self._current_weights = [term.weight_at(self._current_epoch) for term in self.terms.values()]
            self._weights = torch.tensor(self._current_weights, dtype=dtype, device=values.device)
        return self._weights


def _too_few_views(name: str, loss: Loss, views: int) -> UserError:
    """Return the error for a term that expects more views of an image than batches have."""
    advice = "set data.second_view, or use another loss" if loss.views == 2 else "use another loss"
    expected = f"expects {loss.views} views of each image, but batches have {views}"
    return UserError(f"The loss {name!r} ({type(loss).__name__}) {expected}; {advice}.")


def _shapes_of(outputs: Outputs) -> Shapes:
    features = {name: list(value.shape) for name, value in outputs.features.items()}
    shapes: Shapes = {"logits": list(outputs.logits.shape), "features": features}
    if isinstance(outputs.features, Features) and outputs.features.grids:
        shapes["grids"] = {name: list(grid) for name, grid in outputs.features.grids.items()}
    return shapes


def _zeros(shapes: Shapes | None) -> Outputs:
    """Return outputs of these shapes; without a teacher empty ones, which no term reads."""
    if shapes is None:
        return Outputs(torch.zeros(0, 0))
    features = {name: torch.zeros(shape) for name, shape in shapes["features"].items()}
    grids = {name: Grid(*grid) for name, grid in shapes.get("grids", {}).items()}
    return Outputs(torch.zeros(shapes["logits"]), Features(features, grids))

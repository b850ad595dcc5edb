"""Compilation and CUDA graphs: they make the steps of a module faster, at a price."""

from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from kd_lightning.data.protocol import is_image_data
from kd_lightning.errors import UserError
from kd_lightning.losses import Objective
from kd_lightning.modules.graph_choice import describe_graph, reads_no_batches, why_not_graphed
from kd_lightning.modules.graphed_step import GraphedStep
from kd_lightning.networks.compiled import CompileMode, compile_in_place, keep_kernels


@dataclass
class Acceleration:
    """The settings of compilation and CUDA graphs, and the graph of a run.

    Attributes:
        compiles: Compile the network, a teacher and the losses.
        mode: Mode of ``torch.compile``; ``None`` for ``"default"``.
        cuda_graph: Replay the training step as a CUDA graph; ``"auto"`` is off for now.
        graphed_step: The graph, while a run uses one.

    Raises:
        UserError: If a setting has no effect, is none of its values, or excludes another one.
    """

    compiles: bool
    mode: CompileMode | None
    cuda_graph: bool | Literal["auto"]
    graphed_step: GraphedStep | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.mode is not None and not self.compiles:
            raise UserError(f"compile_mode={self.mode!r} has no effect without compile; set compile to true.")
        if self.cuda_graph not in (True, False, "auto"):
            raise UserError(f"cuda_graph must be true, false or 'auto', got {self.cuda_graph!r}.")
        if self.cuda_graph is True and self.mode in ("reduce-overhead", "max-autotune"):
            raise UserError(
                f"compile_mode={self.mode!r} captures graphs of its own, which cuda_graph=True cannot contain; set "
                "compile_mode to 'max-autotune-no-cudagraphs'."
            )

    @property
    def replayed(self) -> bool:
        """The knowledge that the last step was a replay, after which nothing is left to do."""
        return self.graphed_step is not None and self.graphed_step.replayed

    @property
    def capturing(self) -> bool:
        """The knowledge that a step runs in order to be captured."""
        return self.graphed_step is not None and self.graphed_step.capturing

    def compile(self, network: nn.Module, losses: nn.Module | None, data: object) -> None:
        """Compile a network and, if a compiler can hold all of its terms, the objective."""
        folder = keep_kernels()
        rank_zero_info(
            "Compiling: the first steps of training and of validation may take minutes"
            + ("." if folder is None else f"; a later run finds the kernels in {folder}.")
        )
        self.compile_part(network, data)
        if isinstance(losses, Objective) and losses.capturable:
            self.compile_part(losses, data)

    def compile_part(self, module: nn.Module, data: object) -> None:
        """Compile a module in place, for the shapes of the batches of a data module of this package."""
        compile_in_place(module, self.mode or "default", fixed_shapes=is_image_data(data))

    def check_graph(self, module: pl.LightningModule) -> None:
        """Raise before the first step if a graph is asked for and cannot be.

        Raises:
            UserError: With the reason.
        """
        reason = why_not_graphed(module) if self.cuda_graph is True else None
        if reason is not None:
            raise UserError(f"The training step cannot be a CUDA graph, since {reason}, or set cuda_graph to false.")

    def begin(self, module: pl.LightningModule) -> None:
        """Let a graph take the steps, if one is asked for."""
        if self.cuda_graph is not True:
            return
        data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "augments_in_step"):
            data.augments_in_step = reads_no_batches(module.trainer)
        self.graphed_step = GraphedStep(module, module.trainer.optimizers[0])
        self.graphed_step.attach()

    def end(self, data: Any) -> None:
        """Free the graph, also that of a run which an error has ended."""
        if hasattr(data, "augments_in_step"):
            data.augments_in_step = False
        if self.graphed_step is not None:
            self.graphed_step.detach()
            self.graphed_step = None

    def describe(self, module: pl.LightningModule) -> list[str]:
        """Return the parts of the sentence on speed."""
        mode = f", mode {self.mode}" if self.mode else ""
        not_compiled = "is not compiled (compile=true may be faster in long runs)"
        return [
            f"the network {f'is compiled{mode}' if self.compiles else not_compiled}",
            *describe_graph(module, self.cuda_graph),
        ]

"""Measure how fast a distillation step can be on a GPU: eager, compiled, and replayed as a CUDA graph.

Every variant gathers and augments a batch of images that are on the device, and ResNet-20 takes a step of SGD; the
teacher runs in each step ("online"), its logits are read from memory ("cached"), or there is none ("alone"). "batch"
is the gathering alone. Lightning is not used: this shows what is possible, ``bench_epoch.py`` the speed that
``Trainer.fit`` reaches. A line is printed as soon as it is measured, the variants that need no compiling first:

* milliseconds a step, and images per second;
* the share of the hardware's speed: the least time that arithmetic and memory need (see ``bench_epoch.py``) over this;
* microseconds of the host a step: from the call to its return, without waiting for the device.

A variant that fails prints the reason, and the others continue; the script then ends with an error.

    python scripts/bench_graph.py [--teacher resnet34] [--batch-size 128] [--steps 60] [--rounds 5]
    python scripts/bench_graph.py --variants eager graph --kinds cached
    python scripts/bench_graph.py --device cpu --teacher resnet20 --images 64 --batch-size 8 --steps 1 --rounds 1
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from statistics import median

import torch
import torch.nn.functional as F
from bench_epoch import least_seconds, measure_hardware
from environment import processor_name
from random_images import MEAN, STD, random_images
from timing import repeat, time_rounds
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kd_lightning import networks
from kd_lightning.data.augmentation.crops import draw_crops, gather_crops, pack, unpack
from kd_lightning.losses import soft_target_loss
from kd_lightning.teacher.folding import fold_batch_norms

PADDING = 4
WARM_UP = 11  # steps on a side stream before a capture, as torch's notes on CUDA graphs recommend
STEPS_PER_GRAPH = 10  # of the longer graph
LONG_GRAPH = f"compiled + graph x{STEPS_PER_GRAPH}"
VARIANTS = "eager", "graph", "compiled", "compiled + graph", LONG_GRAPH, "reduce-overhead"
CUDA_ONLY = "graph", "compiled + graph", LONG_GRAPH, "reduce-overhead"
KINDS = "batch", "cached", "online", "alone"


class Data:
    """Random images, their order and their crops, all on the device."""

    def __init__(self, count: int, batch_size: int, device: torch.device) -> None:
        pixels, labels = random_images(count)
        self.packed, self.labels = pack(pixels, padding=PADDING).to(device), labels.to(device)
        generator = torch.Generator().manual_seed(0)
        self.teacher_logits = torch.randn(count, 10, generator=generator).half().to(device)
        self.crops = draw_crops(torch.arange(count, device=device), seed=0, epoch=0, padding=PADDING, flip=True)
        self.order = torch.randperm(count, generator=generator).to(device)
        self.offsets = torch.arange(batch_size, device=device)
        mean, std = (torch.tensor(value, device=device)[:, None, None] for value in (MEAN, STD))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def images(self, ids: Tensor) -> Tensor:
        """Return augmented and normalized images."""
        crops = gather_crops(self.packed, ids, self.crops.select(ids), padding=PADDING)
        return unpack(crops, channels=3).mul(self.scale).add_(self.shift)


class Step:
    """A training step that reads and changes only tensors on the device, so that a graph can replay it.

    Args:
        data: Images and the teacher's logits.
        kind: ``"online"``, ``"cached"`` or ``"alone"``.
        teacher: Teacher that runs in each step of the kind ``"online"``.
        mode: Mode of ``torch.compile``; None for an eager step.
    """

    def __init__(self, data: Data, kind: str, teacher: nn.Module, mode: str | None = None) -> None:
        self.data, self.kind, self.teacher, self.mode = data, kind, teacher, mode
        device = data.packed.device
        self.student = networks.resnet20().to(device).to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=torch.tensor(0.1, device=device),  # a number would be part of the graph, which no schedule could change
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            fused=True,
        )
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = self._loss if mode is None else compiled(self._loss, mode)

    def __call__(self) -> None:
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        data = self.data
        ids = data.order.index_select(0, (self.position + data.offsets) % len(data.order))
        self.loss(ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # a graph must allocate the gradients in its own memory
        self.position += len(data.offsets)

    def _loss(self, ids: Tensor) -> Tensor:
        data = self.data
        images = data.images(ids).contiguous(memory_format=torch.channels_last)
        # autocast's cache of cast weights must not refer to the graph's memory
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.student(images).float()
        loss = F.cross_entropy(logits, data.labels.index_select(0, ids))
        if self.kind == "alone":
            return loss
        if self.kind == "cached":
            teacher_logits = data.teacher_logits.index_select(0, ids).float()
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(images.to(torch.bfloat16)).float()
        return 0.1 * loss + 0.9 * soft_target_loss(logits, teacher_logits, temperature=4.0)


def compiled(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """Return a compiled function of static shapes."""
    result: Callable[..., Tensor] = torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
    return result


def capture(function: Callable[[], object], times: int = 1) -> Callable[[], None]:
    """Return a function that replays a CUDA graph of some calls of a function."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        repeat(function, WARM_UP)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeat(function, times)()
    replay: Callable[[], None] = graph.replay
    return replay


class Measurement:
    """Builds, times and prints variants, one after another.

    Args:
        batch_size: Number of images of a step.
        device: Device of the images.
        options: Options of the script.
    """

    def __init__(self, batch_size: int, device: torch.device, options: argparse.Namespace) -> None:
        self.batch_size, self.device, self.options = batch_size, device, options
        self.failed: list[str] = []

    def __call__(self, name: str, build: Callable[[], Callable[[], object]], least: float, steps: int = 1) -> None:
        """Print a variant's line, or the reason for which it fails.

        Args:
            name: Name of the variant.
            build: Function that compiles or captures the step, and returns a function that takes it.
            least: Seconds that the hardware needs for an image.
            steps: Number of training steps of a call.
        """
        try:
            self._measure(name, build, least, steps)
        except Exception as error:  # of torch's compiler, CUDA or memory: the other variants have figures to give
            self.failed.append(name)
            print(f"{name:<30} fails: {reason(error)}", flush=True)

    def _measure(self, name: str, build: Callable[[], Callable[[], object]], least: float, steps: int) -> None:
        start = time.perf_counter()
        skipped = counters["inductor"]["cudagraph_skips"]
        function = build()
        repeat(function, 3)()
        self._synchronize()
        warm_up, calls = time.perf_counter() - start, max(1, self.options.steps // steps)
        (rounds,) = time_rounds({name: repeat(function, calls)}, self.options.rounds).values()
        step = median(rounds) / calls / steps
        skipped = counters["inductor"]["cudagraph_skips"] - skipped
        note = f"; torch left out {skipped} graphs" if skipped else ""
        print(
            f"{name:<30} {step * 1e3:8.3f} ms a step {self.batch_size / step:12,.0f} images/s "
            f"{least * self.batch_size / step:6.1%} of the hardware "
            f"{self._host_seconds(function) / steps * 1e6:8,.0f} us of the host (warm-up {warm_up:.0f} s{note})",
            flush=True,
        )

    def _host_seconds(self, function: Callable[[], object]) -> float:
        seconds = []
        for _ in range(4 * self.options.rounds):
            self._synchronize()
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        self._synchronize()
        return median(seconds)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """Return the first line of an error, and of the one that it followed."""
    earlier = error.__cause__ or error.__context__
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return text if earlier is None else f"{text} (after {reason(earlier)})"


def builders(kind: str, data: Data, teacher: nn.Module) -> dict[str, Callable[[], Callable[[], object]]]:
    """Return the functions that build each variant of a kind; the compiled ones share one compilation."""

    def build(mode: str | None = None) -> Callable[[], object]:
        if kind != "batch":
            return Step(data, kind, teacher, mode)
        ids = data.order[: len(data.offsets)]
        gather = data.images if mode is None else compiled(data.images, mode)
        return lambda: gather(ids)

    @cache
    def build_compiled() -> Callable[[], object]:
        function = build("default")
        repeat(function, 3)()  # compiles before a capture
        return function

    return {
        "eager": build,
        "graph": lambda: capture(build()),
        "compiled": build_compiled,
        "compiled + graph": lambda: capture(build_compiled()),
        LONG_GRAPH: lambda: capture(build_compiled(), STEPS_PER_GRAPH),
        "reduce-overhead": lambda: build("reduce-overhead"),
    }


def main() -> None:
    """Print a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=60, help="steps in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # each kind and mode compiles the same function
    hardware = measure_hardware(device)
    teacher = getattr(networks, options.teacher)().eval()
    student = least_seconds(networks.resnet20(), hardware, passes=3)
    least = {
        "batch": 32 * 32 * (4 + 3 * 4) / hardware.bandwidth,  # reads packed pixels, writes three floats
        "cached": student,
        "online": student + least_seconds(teacher, hardware, passes=1),
        "alone": student,
    }
    folded = fold_batch_norms(teacher)
    assert folded is not None
    folded.requires_grad_(False).to(device, torch.bfloat16).to(memory_format=torch.channels_last)
    data = Data(options.images, options.batch_size, device)
    print(
        f"torch {torch.__version__}, {processor_name(device)}, {options.teacher} -> resnet20, "
        f"batch {options.batch_size}; matrix product {hardware.flops / 1e12:.3f} TFLOP/s, "
        f"copy {hardware.bandwidth / 1e9:.1f} GB/s",
        flush=True,
    )
    chosen = [name for name in VARIANTS if name in options.variants]
    if device.type != "cuda":
        chosen = [name for name in chosen if name not in CUDA_ONLY]
        print("no CUDA graphs on a CPU: " + ", ".join(f'"{name}"' for name in CUDA_ONLY) + " are left out", flush=True)
    measure = Measurement(options.batch_size, device, options)
    steps = {kind: builders(kind, data, folded) for kind in KINDS if kind in options.kinds}
    for name in chosen:
        for kind, variants in steps.items():
            measure(f"{kind}, {name}", variants[name], least[kind], STEPS_PER_GRAPH if name == LONG_GRAPH else 1)
    if measure.failed:
        sys.exit(f"{len(measure.failed)} variants failed: " + "; ".join(measure.failed))


if __name__ == "__main__":
    main()

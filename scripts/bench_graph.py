"""Measure how fast a distillation step can be on a GPU: eager, compiled, and replayed as a CUDA graph.

Every variant gathers and augments a batch of images that are on the device, and ResNet-20 takes a step of SGD; the
teacher runs in each step ("online"), its logits are read from memory ("cached"), or there is none ("alone"). Lightning
is not used: this shows what is possible, ``bench_epoch.py`` the speed that ``Trainer.fit`` reaches.

    python scripts/bench_graph.py [--teacher resnet34] [--batch-size 128] [--steps 60] [--rounds 5]
    python scripts/bench_graph.py --device cpu --teacher resnet20 --images 64 --batch-size 8 --steps 1 --rounds 1
"""

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from random_images import MEAN, STD, random_images
from timing import repeat, time_rounds
from torch import Tensor, nn

from kd_lightning import networks
from kd_lightning.data.augmentation.crops import draw_crops, gather_crops, pack, unpack
from kd_lightning.losses import soft_target_loss
from kd_lightning.teacher.folding import fold_batch_norms

PADDING = 4
WARM_UP = 11  # steps on a side stream before a capture, as torch's notes on CUDA graphs recommend
STEPS_PER_GRAPH = 10  # of the longer graph


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
    """A training step that reads and changes only tensors on the device, so that a graph can replay it."""

    def __init__(self, data: Data, teacher: nn.Module | None, cached: bool, compiled: str | None = None) -> None:
        self.data, self.teacher, self.cached = data, teacher, cached
        device = data.packed.device
        self.student = networks.resnet20().to(device).to(memory_format=torch.channels_last).train()
        rate = torch.tensor(0.1, device=device) if device.type == "cuda" else 0.1
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = self._loss if compiled is None else torch.compile(self._loss, mode=compiled, fullgraph=True)

    def __call__(self) -> None:
        data = self.data
        ids = data.order.index_select(0, (self.position + data.offsets) % len(data.order))
        self.loss(ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position += len(data.offsets)

    def _loss(self, ids: Tensor) -> Tensor:
        data = self.data
        images = data.images(ids).contiguous(memory_format=torch.channels_last)
        # autocast's cache of cast weights must not refer to the graph's memory
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.student(images).float()
        loss = F.cross_entropy(logits, data.labels.index_select(0, ids))
        if self.cached:
            teacher_logits = data.teacher_logits.index_select(0, ids).float()
        elif self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(images.to(torch.bfloat16)).float()
        else:
            return loss
        return 0.1 * loss + 0.9 * soft_target_loss(logits, teacher_logits, temperature=4.0)

    def capture_graph(self, steps: int = 1) -> Callable[[], None]:
        """Return a function that replays a CUDA graph of some steps."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                self()
        return graph.replay


def measure(
    name: str, function: Callable[[], object], data: Data, options: argparse.Namespace, steps_per_call: int = 1
) -> None:
    """Time a function and print its line.

    Args:
        name: Name of the variant.
        function: Function to time.
        data: Images of the variant.
        options: Options of the script.
        steps_per_call: Number of training steps of a call.
    """
    start = time.perf_counter()
    repeat(function, 3)()
    if data.packed.is_cuda:
        torch.cuda.synchronize()
    warm_up, calls = time.perf_counter() - start, max(1, options.steps // steps_per_call)
    (rounds,) = time_rounds({name: repeat(function, calls)}, options.rounds).values()
    step = median(rounds) / calls / steps_per_call
    images = len(data.offsets) / step
    print(
        f"{name:<26} {step * 1e3:8.3f} ms a step {images:12,.0f} images/s "
        f"{50_000 / images:6.2f} s for 50,000 images (warm-up {warm_up:.0f} s)",
        flush=True,
    )


def main() -> None:
    """Print a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=60, help="steps in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    data = Data(options.images, options.batch_size, device)
    teacher = fold_batch_norms(getattr(networks, options.teacher)().eval())
    assert teacher is not None
    teacher.requires_grad_(False).to(device, torch.bfloat16).to(memory_format=torch.channels_last)
    processor = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {processor}, {options.teacher} -> resnet20, batch {options.batch_size}")
    batch = data.order[: options.batch_size]
    measure("batch, eager", lambda: data.images(batch), data, options)
    for name, online, cached in (("alone", None, False), ("cached", None, True), ("online", teacher, False)):
        measure(f"{name}, eager", Step(data, online, cached), data, options)
        if device.type == "cuda":
            measure(f"{name}, graph", Step(data, online, cached).capture_graph(), data, options)
        measure(f"{name}, compiled", Step(data, online, cached, "default"), data, options)
        if device.type == "cuda":
            compiled = Step(data, online, cached, "default")
            for _ in range(3):
                compiled()  # compiles before the capture
            measure(f"{name}, compiled, graph", compiled.capture_graph(), data, options)
            longer = compiled.capture_graph(STEPS_PER_GRAPH)
            measure(f"{name}, compiled, graph x{STEPS_PER_GRAPH}", longer, data, options, STEPS_PER_GRAPH)


if __name__ == "__main__":
    main()

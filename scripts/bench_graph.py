"""Measure how fast a distillation step can be on a GPU: eager, compiled, and replayed as a CUDA graph.

All sides do the same arithmetic: a batch is gathered and augmented from images on the device, the teacher runs (in
each step, once for its cached logits, or not at all), and ResNet-20 takes a step of SGD, all without Lightning. They
show what is possible; ``bench_epoch.py`` shows the speed that ``Trainer.fit`` reaches.

    python scripts/bench_graph.py [--teacher resnet34] [--batch-size 128] [--steps 60]
    python scripts/bench_graph.py --device cpu --images 2000 --steps 3  # only shows that it runs
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import repeat, time_rounds
from torch import Tensor, nn

from kd_lightning import networks
from kd_lightning.data.augmentation.crops import draw_crops, gather_crops, pack, unpack
from kd_lightning.losses import soft_target_loss
from kd_lightning.teacher.folding import fold_batch_norms

PADDING = 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
WARM_UP = 11  # steps on a side stream before a capture, as torch's notes on CUDA graphs ask for
REPEATED = 10  # steps of the longer graph


class Data:
    """Random images of CIFAR-10's size, their order and their crops, all on the device."""

    def __init__(self, count: int, batch_size: int, device: torch.device) -> None:
        seeded = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=seeded)
        self.packed = pack(pixels, padding=PADDING).to(device)
        self.labels = torch.randint(10, (count,), generator=seeded).to(device)
        self.teacher_logits = torch.randn(count, 10, generator=seeded).half().to(device)
        everything = torch.arange(count, device=device)
        self.crops = draw_crops(everything, seed=0, epoch=0, padding=PADDING, flip=True)
        self.order = torch.randperm(count, generator=seeded).to(device)
        self.offsets = torch.arange(batch_size, device=device)
        mean, std = (torch.tensor(value, device=device)[:, None, None] for value in (MEAN, STD))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def images(self, ids: Tensor) -> Tensor:
        crops = gather_crops(self.packed, ids, self.crops.select(ids), padding=PADDING)
        return unpack(crops, channels=3).mul(self.scale).add_(self.shift)


class Step:
    """A training step; everything that it reads and changes lies on the device, so that a graph can replay it."""

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
        # a cache of cast weights would outlive the graph's memory
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

    def graphed(self, steps: int = 1) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                self()
        return graph.replay


def measure(name: str, function: Callable[[], object], data: Data, steps: int, each: int = 1) -> None:
    """Print the median of five rounds of ``steps`` steps; a call of ``function`` makes ``each`` of them."""
    started = time.perf_counter()
    repeat(function, 3)()
    if data.packed.is_cuda:
        torch.cuda.synchronize()
    warm_up, calls = time.perf_counter() - started, max(1, steps // each)
    step = statistics.median(time_rounds({name: repeat(function, calls)}, 5)[name]) / calls / each
    images = len(data.offsets) / step
    print(
        f"{name:<26} {step * 1e3:8.3f} ms a step {images:12,.0f} images/s "
        f"{50_000 / images:6.2f} s for 50,000 images (warm-up {warm_up:.0f} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
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
    on = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {on}, {options.teacher} -> resnet20, batch {options.batch_size}")
    batch = data.order[: options.batch_size]
    measure("batch, eager", lambda: data.images(batch), data, options.steps)
    for name, online, cached in (("alone", None, False), ("cached", None, True), ("online", teacher, False)):
        measure(f"{name}, eager", Step(data, online, cached), data, options.steps)
        if device.type == "cuda":
            measure(f"{name}, graph", Step(data, online, cached).graphed(), data, options.steps)
        measure(f"{name}, compiled", Step(data, online, cached, "default"), data, options.steps)
        if device.type == "cuda":
            compiled = Step(data, online, cached, "default")
            for _ in range(3):
                compiled()  # compiles before the capture
            measure(f"{name}, compiled, graph", compiled.graphed(), data, options.steps)
            longer = compiled.graphed(REPEATED)
            measure(f"{name}, compiled, graph x{REPEATED}", longer, data, options.steps, REPEATED)


if __name__ == "__main__":
    main()

"""The benchmarks run with small sizes, and their loops do what they say."""

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.networks import ResNet

pytestmark = pytest.mark.usefixtures("beside_the_scripts")
SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")
TINY = ["--teacher", "resnet20", "--images", "32", "--batch-size", "8"]
COMMANDS: dict[str, tuple[list[str], str]] = {
    "bench_augmentation": (["--size", "32", "--batch-size", "2", "--rounds", "1"], "times"),
    "bench_baseline": ([*TINY, "--steps", "1", "--rounds", "1"], "competent loop"),
    "bench_data": (["--batch-size", "8", "--batches", "2", "--rounds", "1"], "ours / competent loader"),
    "bench_epoch": ([*TINY, "--threads", "1"], "of the hardware's limit"),
    "bench_export": (["--rounds", "1"], "int8"),
    "bench_graph": (
        ["--device", "cpu", *TINY, "--steps", "1", "--rounds", "1", "--variants", "eager", "graph"],
        "of the hardware",
    ),
    "bench_losses": (["--batch-size", "4", "--rounds", "1"], "of KD"),
    "bench_operations": (["--teacher", "resnet20"], "operations a step"),
    "bench_overhead": (["--rounds", "1", "--steps", "1"], "this package"),
    "bench_photographs": (["--size", "32", "--batch-size", "8", "--rounds", "1"], "times torchvision"),
    "bench_step": ([*TINY, "--steps", "1", "--rounds", "1"], "x the competent loop"),
    "environment": (["--device", "cpu"], "CPU threads"),
}


@pytest.fixture
def baseline() -> ModuleType:
    return importlib.import_module("bench_baseline")


@pytest.fixture
def graph() -> ModuleType:
    return importlib.import_module("bench_graph")


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = importlib.import_module("random_images").random_images(24)
    return images, labels


def tiny() -> ResNet:
    return ResNet([1, 1], [4, 8], 10)


# the plain loops


def test_both_loaders_show_the_same_distribution(baseline: ModuleType, images: Any) -> None:
    naive = baseline.NaiveImages(*images)
    competent = baseline.CompetentImages(*images)
    for index in range(len(naive)):  # a crop of the padded image, flipped or not, with the same label
        seen = {}
        for _ in range(8):
            image, label = competent[index]
            assert image.dtype == torch.uint8
            seen[image.numpy().tobytes()] = label
        assert len(seen) > 1
        assert set(seen.values()) == {naive[index][1]}
    plain = nn.Identity()
    naive.transform.transforms[1:3] = competent.transform.transforms[:] = [plain]  # without crops and flips
    normalized = baseline.normalize(torch.stack([competent[index][0] for index in range(len(naive))]))
    torch.testing.assert_close(normalized, torch.stack([naive[index][0] for index in range(len(naive))]))
    assert normalized.is_contiguous(memory_format=torch.channels_last)


def test_the_number_of_workers(baseline: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert baseline.worker_count(torch.device("cuda")) == 8
    assert baseline.worker_count(CPU) == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert baseline.worker_count(torch.device("cuda")) == 4


def test_both_loops_take_the_same_step(baseline: ModuleType, images: Any) -> None:
    teacher, student = tiny(), tiny()
    trained = []
    for step, batch in (
        (baseline.NaiveStep, baseline.normalize(images[0]).contiguous()),
        (baseline.CompetentStep, images[0]),
    ):
        networks = tiny(), tiny()
        for network, original in zip(networks, (teacher, student), strict=True):
            network.load_state_dict(original.state_dict())
        step(*networks, [(batch, images[1])], CPU)()
        trained.append(networks[1].state_dict())
    assert any(not torch.equal(trained[0][name], student.state_dict()[name]) for name in trained[0])
    for name, values in trained[0].items():  # one in bfloat16
        torch.testing.assert_close(trained[1][name], values, rtol=0.05, atol=0.02)


def test_the_competent_loop_leaves_the_choice_of_kernels_to_others(baseline: ModuleType, images: Any) -> None:
    before = torch.backends.cudnn.benchmark
    baseline.CompetentStep(tiny(), tiny(), [images], CPU)()
    assert torch.backends.cudnn.benchmark == before


def test_our_batches_are_placed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    data = importlib.import_module("random_images").RandomImages(8, count=32)
    places = []
    augment = data.augment

    def recorded(batch: Any) -> Any:
        places.append(batch.places)
        return augment(batch)

    monkeypatch.setattr(data, "augment", recorded)
    batches = data.augmented_batches(CPU)
    for _ in range(5):  # into the second epoch
        assert next(batches).images.shape == (8, 3, 32, 32)
    assert data.trainer.strategy.root_device == CPU
    assert all(place.first.device == CPU for place in places)


# graphs


def options(**more: Any) -> Any:
    return type("Options", (), {"steps": 2, "rounds": 1, **more})


def test_the_steps_of_a_kind(graph: ModuleType) -> None:
    data = graph.Data(24, 8, CPU)
    for kind in ("cached", "online", "alone"):
        step = graph.builders(kind, data, tiny().to(torch.bfloat16).eval())["eager"]()
        before = [weight.detach().clone() for weight in step.student.parameters()]
        for _ in range(4):
            step()
        assert step.position == 32
        assert all(weight.grad is None for weight in step.student.parameters())
        assert any(
            not torch.equal(old, new.detach()) for old, new in zip(before, step.student.parameters(), strict=True)
        )
        (group,) = step.optimizer.param_groups
        assert isinstance(group["lr"], torch.Tensor)


def test_a_graph_holds_its_steps_after_a_warm_up(graph: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Stream:
        def wait_stream(self, other: "Stream") -> None:
            calls.append("wait")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextlib.contextmanager
    def recorded(name: str) -> Iterator[None]:
        calls.append(name)
        yield
        calls.append(f"end of {name}")

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", lambda _: recorded("stream"))
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", lambda _: recorded("graph"))
    replay = graph.capture(lambda: calls.append("step"), 3)
    replay()
    warm_up = ["wait", "stream", *["step"] * 11, "end of stream", "wait"]
    assert calls == [*warm_up, "graph", *["step"] * 3, "end of graph", "replay"]


def test_a_variant_that_fails_gives_its_reason(graph: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> Any:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise RuntimeError("the capture was invalidated\nand more") from error

    measure = graph.Measurement(8, CPU, options())
    measure("alone, graph", build, 1e-6)
    measure("alone, eager", lambda: lambda: None, 1e-6)
    failed, measured = capsys.readouterr().out.splitlines()
    assert failed.split(maxsplit=2)[2] == ("fails: RuntimeError: the capture was invalidated (after KeyError: 'first')")
    assert "% of the hardware" in measured
    assert measure.failed == ["alone, graph"]


def test_a_call_of_several_steps_counts_them(graph: ModuleType) -> None:
    calls: list[int] = []
    graph.Measurement(8, CPU, options(steps=20))("graph", lambda: lambda: calls.append(1), 1e-6, steps=10)
    assert len(calls) == 3 + 2 * 2 + 4  # warm-up, two rounds of two calls, the host's time


def test_variants_and_kinds_have_builders(graph: ModuleType) -> None:
    for kind in graph.KINDS:
        assert tuple(graph.builders(kind, graph.Data(24, 8, CPU), tiny())) == graph.VARIANTS


# the commands


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    arguments, shown = COMMANDS[name]
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    assert shown in run.stdout


def test_every_benchmark_is_tried() -> None:
    assert {file.stem for file in SCRIPTS.glob("bench_*.py")} <= set(COMMANDS)

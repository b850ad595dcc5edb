"""A frozen teacher runs as a folded copy, or through its cached logits of fixed views."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Augmentation, DigitsDataModule, DistillationModule
from kd_lightning.data.augmentation import mixing
from kd_lightning.data.image_set import ImageSet
from kd_lightning.features import Outputs
from kd_lightning.losses import DistillationLoss, HardTargetLoss, HintLoss, SoftTargetLoss
from kd_lightning.networks import DataConfig, EnsembleTeacher, ResNet, resnet20, set_data_config, wrn_16_2
from kd_lightning.teacher.frozen_teacher import FrozenTeacher

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]

CPU = torch.device("cpu")
TRAINING_IMAGES = 1150


def with_random_norms(network: nn.Module) -> nn.Module:
    """Set random statistics and weights in the batch norms, so that folding changes the convolutions."""
    generator = torch.Generator().manual_seed(1)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            state = part.state_dict()
            for name, low, high in (("running_var", 0.5, 2), ("weight", 0.5, 1.5), ("bias", -0.3, 0.3)):
                state[name].uniform_(low, high, generator=generator)
            state["running_mean"].uniform_(-0.3, 0.3, generator=generator)
    return network.eval()


def count_batch_norms(network: nn.Module | None) -> int:
    assert network is not None
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


# --- the folded copy


def _torchvision_resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


@pytest.mark.parametrize(("build", "remaining"), [(resnet20, 0), (wrn_16_2, 6), (_torchvision_resnet18, 0)])
def test_a_folded_copy_has_the_logits_of_the_network(build: Callable[[], nn.Module], remaining: int) -> None:
    """In a wide ResNet norms precede convolutions, so that some cannot be folded."""
    network = with_random_norms(build())
    before = copy.deepcopy(network.state_dict())
    frozen_teacher = FrozenTeacher(network, [])
    frozen_teacher.optimize_for_inference(torch.rand(4, 3, 32, 32), None, compile=None)
    assert frozen_teacher.folded
    assert count_batch_norms(frozen_teacher.inference_network) == remaining < count_batch_norms(network)
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
    found = frozen_teacher(images).logits
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert frozen_teacher.inference_network is not frozen_teacher.network
    with torch.no_grad():
        assert torch.equal(frozen_teacher(images).logits, found)
    for kept in (network, frozen_teacher.network):
        assert kept.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in kept.state_dict().items())


class DataDependentBranch(nn.Module):
    """Branches on the values of its input, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)
        self.bn = nn.BatchNorm2d(10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.bn(self.conv(images))
        return maps.mean((2, 3)) if images.mean() > 0 else maps.amax((2, 3))


class BranchOnTensorType(nn.Module):
    """Takes another branch while it is traced, since a proxy is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            images = 3 * images
        return self.conv(images).mean((2, 3))


class SharedConvolution(nn.Module):
    """Has one convolution before two norms, so that neither can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)
        self.bn1 = nn.BatchNorm2d(10)
        self.bn2 = nn.BatchNorm2d(10)

    def forward(self, images: Tensor) -> Tensor:
        return (self.bn1(self.conv(images)) + self.bn2(self.conv(-images))).mean((2, 3))


@pytest.mark.parametrize("kind", [DataDependentBranch, BranchOnTensorType, SharedConvolution])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_network_that_cannot_be_folded_is_run_as_it_is(kind: type[nn.Module], dtype: torch.dtype | None) -> None:
    network = with_random_norms(kind())
    frozen_teacher = FrozenTeacher(network, [])
    frozen_teacher.optimize_for_inference(torch.rand(4, 1, 8, 8), dtype, compile=None)
    assert not frozen_teacher.folded
    for name, value in frozen_teacher.network.state_dict().items():
        assert value.dtype == network.state_dict()[name].dtype
        assert torch.equal(value, network.state_dict()[name])
    for images in (torch.rand(8, 1, 8, 8), -torch.rand(8, 1, 8, 8)):
        with torch.no_grad():
            expected = network(images)
        tolerance: dict[str, Any] = {"rtol": 0.05, "atol": 0.05} if dtype else {}
        torch.testing.assert_close(frozen_teacher(images).logits, expected, **tolerance)


def test_no_folded_copy_is_made_if_layers_are_read(small: Networks) -> None:
    frozen_teacher = FrozenTeacher(small(), ["layer1"])
    frozen_teacher.optimize_for_inference(torch.rand(4, 1, 8, 8), torch.bfloat16, compile=None)
    assert frozen_teacher.inference_network is None
    assert not frozen_teacher.folded
    outputs = frozen_teacher(torch.rand(2, 1, 8, 8))
    assert outputs.logits.dtype == torch.float32
    assert set(outputs.features) == {"layer1"}


def test_no_folded_copy_is_made_for_a_loss_on_features(small: Networks, make_trainer: Trainers) -> None:
    losses: dict[str, DistillationLoss] = {"hard": HardTargetLoss(), "hint": HintLoss(student_layers=["layer1"])}
    module = DistillationModule(small(), small(8), losses=losses, teacher_check="off")
    make_trainer(fast_dev_run=True).fit(module, DigitsDataModule(batch_size=128))
    assert module.frozen_teacher is not None
    assert module.frozen_teacher.inference_network is None


def test_in_mixed_precision_the_folded_copy_is_bfloat16_and_the_teacher_is_kept(
    small: Networks, make_trainer: Trainers
) -> None:
    original = with_random_norms(small(8))
    before = copy.deepcopy(original.state_dict())
    module = DistillationModule(small(), original, teacher_check="off")
    make_trainer(precision="bf16-mixed", limit_train_batches=2, limit_val_batches=1).fit(
        module, DigitsDataModule(batch_size=128)
    )
    frozen_teacher = module.frozen_teacher
    assert frozen_teacher is not None
    assert frozen_teacher.inference_network is not None
    assert frozen_teacher.folded
    assert {weight.dtype for weight in frozen_teacher.inference_network.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in frozen_teacher.inference_network.parameters())
    assert module.teacher is not None
    for name, value in module.teacher.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert "inference_network" not in " ".join([*module.state_dict(), *dict(module.named_modules())])
    images = torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        expected = original(images)
    logits = module.reference_logits(images)
    assert logits is not None
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


# --- cached logits


class RecordTeacherLogits(SoftTargetLoss):
    """Records the teacher's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        self.logits.append(teacher.logits.clone())
        return super().forward(student, teacher, labels)


class RecordTraining(pl.Callback):
    """Counts the images that the teacher runs on, and records losses and ids."""

    def __init__(self) -> None:
        self.images, self.val_images = 0, 0
        self.losses: list[float] = []
        self.ids: list[Tensor] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch > 0 and self.losses:
            return

        def count(network: nn.Module, arguments: Any, logits: Tensor) -> None:
            self.images += len(logits) if trainer.training else 0
            self.val_images += 0 if trainer.training else len(logits)

        pl_module.teacher.register_forward_hook(count)  # counted too, if it should run
        pl_module.frozen_teacher.inference_network.register_forward_hook(count)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.ids.append(batch[2])


class Run:
    """A finished distillation on the digits with V views, with its records."""

    def __init__(
        self,
        trainer: Trainers,
        teacher: nn.Module,
        cache: bool | str,
        epochs: int = 3,
        views: int = 2,
        seed: int = 0,
        path: Path | None = None,
        callbacks: Sequence[pl.Callback] = (),
        data: dict[str, Any] | None = None,
        losses: dict[str, DistillationLoss] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.student = ResNet([1, 1], [4, 8], in_channels=1)
        self.record, self.soft_loss = RecordTraining(), RecordTeacherLogits()
        losses = {"hard": HardTargetLoss(weight=0.1), "soft": self.soft_loss} if losses is None else losses
        self.module = DistillationModule(
            self.student,
            teacher,
            losses=losses,
            teacher_check="off",
            teacher_cache=cache,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05),
        )
        self.trainer = trainer(
            max_epochs=epochs, callbacks=[self.record, *callbacks], **{"limit_val_batches": 0} | options
        )
        self.data = DigitsDataModule(**{"batch_size": 200, "views": views} | (data or {}))
        self.trainer.fit(self.module, self.data, ckpt_path=path, weights_only=True if path else None)

    @property
    def logits(self) -> Tensor:
        return torch.cat(self.soft_loss.logits)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()


@pytest.fixture
def teacher(small: Networks) -> nn.Module:
    """Logits are up to 5, where float16 rounds by up to 0.002; every digit is predicted."""
    network = with_random_norms(small(8))
    stored = DigitsDataModule().load("train")
    assert isinstance(stored, ImageSet)
    with torch.no_grad():
        network.get_parameter("fc.weight").mul_(60)
        logits = network((stored.pixels / 255 - 0.305) / 0.376)
        network.get_parameter("fc.bias").sub_(logits.mean(0))
    return network


@pytest.fixture(params=["memory", "folder"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> bool | str:
    return True if request.param == "memory" else str(tmp_path / "logits")


def test_training_on_cached_logits_equals_training_without_a_cache(
    make_trainer: Trainers, teacher: nn.Module, cache: bool | str
) -> None:
    uncached, cached = Run(make_trainer, teacher, False, epochs=4), Run(make_trainer, teacher, cache, epochs=4)
    assert len(uncached.record.losses) == len(cached.record.losses) == 4 * 5
    assert all(torch.equal(a, b) for a, b in zip(uncached.record.ids, cached.record.ids, strict=True))
    assert uncached.logits.abs().max() > 5
    assert torch.equal(cached.logits, cached.logits.half().float())
    torch.testing.assert_close(cached.logits, uncached.logits, rtol=1.001 * 2**-11, atol=1e-5)
    # another batch size may change the last bit of float32, and so at times that of float16
    assert (cached.logits == uncached.logits.half().float()).float().mean() > 0.99
    assert cached.record.losses == pytest.approx(uncached.record.losses, rel=1e-3)
    for name, value in uncached.weights.items():
        torch.testing.assert_close(cached.weights[name], value, rtol=2e-3, atol=2e-3)
    assert uncached.record.images == 4 * 5 * 200


def test_training_on_cached_logits_equals_training_without_a_cache_in_mixed_precision(
    make_trainer: Trainers, teacher: nn.Module
) -> None:
    uncached, cached = (Run(make_trainer, teacher, cache, precision="bf16-mixed") for cache in (False, True))
    assert torch.equal(cached.logits, uncached.logits)  # bfloat16 has fewer digits than float16
    assert cached.record.losses == uncached.record.losses


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("preset", ["standard", "strong"])
def test_cached_views_have_the_pixels_of_training_in_every_precision(
    make_trainer: Trainers, teacher: nn.Module, preset: str, precision: str
) -> None:
    mixing._fractions.cache_clear()  # which the first of both fills
    data = {"augmentation": Augmentation(preset=preset)}
    cached, uncached = (Run(make_trainer, teacher, cache, precision=precision, data=data) for cache in (True, False))
    assert cached.record.images == 2 * TRAINING_IMAGES
    assert torch.equal(cached.logits, uncached.logits)  # bfloat16 has fewer digits than float16


def test_cached_logits_are_of_images_normalized_for_the_teacher(make_trainer: Trainers, teacher: nn.Module) -> None:
    set_data_config(teacher, DataConfig.of((0.5,), (0.2,)))
    plain = copy.deepcopy(teacher)
    set_data_config(plain, DataConfig())
    uncached, cached = (Run(make_trainer, teacher, cache, epochs=1) for cache in (False, True))
    torch.testing.assert_close(cached.logits, uncached.logits, rtol=1.001 * 2**-11, atol=1e-5)
    assert not torch.allclose(Run(make_trainer, plain, True, epochs=1).logits, cached.logits, atol=0.1)


@pytest.mark.parametrize(("epochs", "views"), [(1, 3), (2, 3), (3, 3), (5, 2), (3, 1)])
def test_the_teacher_runs_once_for_each_view(
    make_trainer: Trainers, teacher: nn.Module, epochs: int, views: int
) -> None:
    run = Run(make_trainer, teacher, True, epochs=epochs, views=views, limit_val_batches=1.0)
    assert run.record.images == min(epochs, views) * TRAINING_IMAGES
    assert len(run.record.losses) == epochs * 5


def test_the_teacher_runs_once_for_each_validation_image(make_trainer: Trainers, teacher: nn.Module) -> None:
    uncached, cached = (Run(make_trainer, teacher, cache, limit_val_batches=1.0) for cache in (False, True))
    images = len(cached.data.splits.val_samples)
    assert (uncached.record.val_images, cached.record.val_images) == (3 * images, images)
    for name in ("val/agreement", "val/kl"):
        expected = float(uncached.trainer.callback_metrics[name])
        assert float(cached.trainer.callback_metrics[name]) == pytest.approx(expected, rel=2e-3)


def test_the_cache_includes_the_images_that_drop_last_leaves_out(make_trainer: Trainers, teacher: nn.Module) -> None:
    """With batches of 800 an epoch is one step, which leaves out other images each time."""
    run = Run(make_trainer, teacher, True, epochs=4, data={"batch_size": 800})
    assert run.record.images == 2 * TRAINING_IMAGES
    assert run.module.frozen_teacher is not None
    cache = run.module.frozen_teacher.cache
    assert cache is not None
    cache.load(1, CPU)
    train = run.data.train_samples
    logits = cache(train * 2 + 1)
    assert (logits.abs().sum(1) > 0).all()
    shown = run.data.augment(next(iter(run.data.view_dataloader(1))))
    with torch.no_grad():
        expected = teacher(shown.images[:3])  # another batch size
    torch.testing.assert_close(cache(shown.ids[:3]), expected, rtol=1e-3, atol=1e-3)


def test_a_folder_of_logits_is_reused_for_another_student(
    make_trainer: Trainers, teacher: nn.Module, tmp_path: Path
) -> None:
    folder = str(tmp_path / "logits")
    first = Run(make_trainer, teacher, folder, epochs=2)
    same = Run(make_trainer, teacher, folder, epochs=2)
    other = Run(make_trainer, teacher, folder, epochs=3, seed=7, data={"batch_size": 100})
    assert first.record.images == 2 * TRAINING_IMAGES
    assert same.record.images == other.record.images == 0
    assert torch.equal(first.logits, same.logits)
    assert all(torch.equal(value, same.weights[name]) for name, value in first.weights.items())
    assert other.record.losses[:5] != first.record.losses[:5]
    logits_of = dict(zip(torch.cat(first.record.ids).tolist(), first.logits, strict=True))
    for sample, logits in zip(torch.cat(other.record.ids).tolist(), other.logits, strict=True):
        assert sample not in logits_of or torch.equal(logits_of[sample], logits)


def test_a_later_run_computes_only_the_missing_views(
    make_trainer: Trainers, teacher: nn.Module, tmp_path: Path
) -> None:
    folder = str(tmp_path / "logits")
    assert Run(make_trainer, teacher, folder, epochs=1, views=3).record.images == TRAINING_IMAGES
    second = Run(make_trainer, teacher, folder, epochs=4, views=3)
    assert second.record.images == 2 * TRAINING_IMAGES
    file = sorted((tmp_path / "logits").glob("*.float16"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    third = Run(make_trainer, teacher, folder, epochs=3, views=3)
    assert third.record.images == TRAINING_IMAGES
    assert torch.equal(third.logits, second.logits[: len(third.logits)])


def with_another_bias(teacher: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(teacher)
    teacher.state_dict()["fc.bias"][3] += 0.001
    return teacher


def with_another_running_mean(teacher: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(teacher)
    teacher.state_dict()["bn1.running_mean"][0] += 0.001
    return teacher


@pytest.mark.parametrize(
    ("alter", "options", "named"),
    [
        (with_another_bias, {}, "teacher"),
        (with_another_running_mean, {}, "teacher"),
        (copy.deepcopy, {"data": {"view_seed": 1}}, "view_seed"),
        (copy.deepcopy, {"data": {"augmentation": Augmentation(padding=2)}}, "augmentation"),
        (copy.deepcopy, {"data": {"mean": (0.3,)}}, "statistics"),
        (copy.deepcopy, {"data": {"val_fraction": 0.3}}, "images"),
        (copy.deepcopy, {"data": {"seed": 1}}, "images"),
        (copy.deepcopy, {"views": 3}, "views"),
        (copy.deepcopy, {"precision": "bf16-mixed"}, "precision"),
    ],
)
def test_a_folder_of_other_logits_is_refused_with_the_difference(
    make_trainer: Trainers, teacher: nn.Module, tmp_path: Path, alter: Any, options: dict[str, Any], named: str
) -> None:
    folder = str(tmp_path / "logits")
    small_run: dict[str, Any] = {"epochs": 1, "limit_train_batches": 1}
    Run(make_trainer, teacher, folder, **small_run)
    record = CountSteps()
    with pytest.raises(ValueError, match=rf"were computed differently \(different: {named}\); name another folder"):
        Run(make_trainer, alter(teacher), folder, **small_run | options, callbacks=[record])
    assert record.steps == 0


def with_other_statistics(teacher: nn.Module) -> nn.Module:
    set_data_config(teacher, DataConfig.of((0.5,), (0.2,)))
    return teacher


def averaging_probabilities(teacher: EnsembleTeacher) -> nn.Module:
    return EnsembleTeacher(list(copy.deepcopy(teacher.networks)), average="probabilities")


def with_other_weights(teacher: EnsembleTeacher) -> nn.Module:
    return EnsembleTeacher(list(copy.deepcopy(teacher.networks)), weights=[1.0, 9.0])


@pytest.mark.parametrize("alter", [with_other_statistics, averaging_probabilities, with_other_weights])
def test_a_folder_of_a_teacher_with_equal_weights_and_other_outputs_is_refused(
    make_trainer: Trainers, small: Networks, teacher: nn.Module, tmp_path: Path, alter: Any
) -> None:
    if alter is not with_other_statistics:
        teacher = EnsembleTeacher([teacher, with_random_norms(small(6))])
    folder = str(tmp_path / "logits")
    Run(make_trainer, teacher, folder, epochs=1)
    with pytest.raises(ValueError, match="were computed differently"):
        Run(make_trainer, alter(teacher), folder, epochs=1)


# --- errors


class CountSteps(pl.Callback):
    steps = 0

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"losses": {"soft": SoftTargetLoss(), "hint": HintLoss(student_layers=["layer1"])}},
            "the loss 'hint' reads the teacher's layers, which are not cached",
        ),
        ({"views": None}, "each epoch has new views; set views=V on a data module of this package"),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_logits_that_cannot_be_cached_are_refused_before_the_first_step(
    make_trainer: Trainers, teacher: nn.Module, options: dict[str, Any], reason: str, tmp_path: Path, on_disk: bool
) -> None:
    record = CountSteps()
    cache = str(tmp_path / "logits") if on_disk else True
    with pytest.raises(ValueError, match=r"^The teacher's logits cannot be cached: ") as caught:
        Run(make_trainer, teacher, cache, callbacks=[record], **copy.deepcopy(options))
    message = f"The teacher's logits cannot be cached: {reason}, or set teacher_cache=False."
    assert str(caught.value) == message
    assert record.steps == 0
    assert not (tmp_path / "logits").exists()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("from_data_module", [False, True])
def test_a_cache_with_plain_loaders_is_refused(
    make_trainer: Trainers, small: Networks, teacher: nn.Module, from_data_module: bool
) -> None:
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    loader = (
        DigitsDataModule(views=2).train_dataloader()
        if from_data_module
        else DataLoader(TensorDataset(images, labels), 4)
    )
    module = DistillationModule(small(), teacher, teacher_check="off", teacher_cache=True)
    trainer = make_trainer()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        trainer.fit(module, loader, loader)
    assert "\n" not in str(caught.value)
    if not from_data_module:
        assert str(caught.value).startswith("The teacher's logits cannot be cached: each epoch has new views")
    assert trainer.global_step == 0


def test_a_module_with_a_cache_is_tested_without_one(
    make_trainer: Trainers, small: Networks, teacher: nn.Module
) -> None:
    losses: dict[str, DistillationLoss] = {"hint": HintLoss(student_layers=["layer1"])}
    module = DistillationModule(small(), teacher, losses=losses, teacher_cache=True)
    assert "test/agreement" in make_trainer().test(module, DigitsDataModule(), verbose=False)[0]


# --- two processes


class WriteRankCache(pl.Callback):
    """Writes the cached views of a rank, the number of images it ran on, and the number of views it stored."""

    def __init__(self, folder: Path, record: RecordTraining) -> None:
        self.folder, self.record, self.put = folder, record, 0
        folder.mkdir()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        cache = pl_module.frozen_teacher.cache
        if trainer.current_epoch > 0:
            return
        original = cache.put

        def put(view: int, logits: Tensor) -> None:
            self.put += 1
            original(view, logits)

        cache.put = put

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        cache, samples = pl_module.frozen_teacher.cache, trainer.datamodule.train_samples  # type: ignore[attr-defined]
        views = []
        for view in range(cache.views):
            assert view in cache
            cache.load(view, CPU)
            views.append(cache(samples * cache.views + view))
        state = {"views": torch.stack(views), "images": self.record.images, "put": self.put}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*")
@pytest.mark.filterwarnings("ignore:.*barrier.*")
@pytest.mark.filterwarnings("ignore:.*nn.parallel.*")
def test_ranks_divide_the_images_and_have_equal_caches(
    make_trainer: Trainers, teacher: nn.Module, cache: bool | str, tmp_path: Path
) -> None:
    """1,121 is divisible by neither 2 nor the batch size."""
    results = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        cache_of_run = cache if isinstance(cache, bool) else f"{cache}{world}"
        options = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {"devices": 1}
        record = RecordTraining()
        writer = WriteRankCache(folder, record)
        data = {"val_fraction": 0.22, "batch_size": 200 // world}
        Run(make_trainer, teacher, cache_of_run, epochs=3, data=data, callbacks=[record, writer], **options)
        results[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    (single,), (first, second) = results[1], results[2]
    assert single["views"].shape == (2, 1121, 10)
    assert torch.equal(first["views"], second["views"])
    torch.testing.assert_close(first["views"], single["views"], rtol=1e-3, atol=1e-3)
    assert (single["views"].abs().sum(2) > 0).all()
    assert (single["images"], first["images"], second["images"]) == (2 * 1121, 2 * 561, 2 * 560)
    assert (single["put"], first["put"], second["put"]) == (2, 2, 2 if cache is True else 0)  # only rank 0 writes files
    if not isinstance(cache, bool):
        assert sorted(path.name for path in Path(f"{cache}2").iterdir()) == sorted(
            path.name for path in Path(f"{cache}1").iterdir()
        )
        later = Run(make_trainer, teacher, f"{cache}2", epochs=3, data={"val_fraction": 0.22})
        assert later.record.images == 0


# --- checkpoints


class StopAfterEpoch(pl.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def test_an_interrupted_run_resumes_to_identical_weights(
    make_trainer: Trainers, teacher: nn.Module, cache: bool | str, tmp_path: Path
) -> None:
    def cache_of(name: str) -> bool | str:
        return cache if isinstance(cache, bool) else f"{cache}-{name}"

    uninterrupted = Run(make_trainer, teacher, cache_of("uninterrupted"), epochs=5, views=3)
    interrupted = Run(make_trainer, teacher, cache_of("interrupted"), epochs=5, views=3, callbacks=[StopAfterEpoch(1)])
    interrupted.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert len(interrupted.record.losses) == 10
    resumed = Run(
        make_trainer, teacher, cache_of("interrupted"), epochs=5, views=3, seed=9, path=tmp_path / "last.ckpt"
    )
    assert resumed.record.losses == uninterrupted.record.losses[10:]
    for name, value in uninterrupted.weights.items():
        assert torch.equal(resumed.weights[name], value), name
    assert not torch.equal(interrupted.weights["network.fc.weight"], uninterrupted.weights["network.fc.weight"])
    # views 2, 0, 1 are loaded, of which a folder has 0 and 1
    assert resumed.record.images == (3 if isinstance(cache, bool) else 1) * TRAINING_IMAGES


def test_a_checkpoint_with_a_cache_is_loaded_and_tested(
    make_trainer: Trainers, small: Networks, teacher: nn.Module, cache: bool | str, tmp_path: Path
) -> None:
    run = Run(make_trainer, teacher, cache, epochs=2)
    run.trainer.save_checkpoint(tmp_path / "student.ckpt")
    content = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert content["hyper_parameters"]["teacher_cache"] == cache
    assert content["state_dict"].keys() == {f"network.{name}" for name in run.student.state_dict()}
    expected = run.trainer.test(run.module, run.data, verbose=False)[0]
    assert expected["test/agreement"] < 1
    for given in (None, teacher):
        loaded = DistillationModule.load_from_checkpoint(
            tmp_path / "student.ckpt",
            student=small(),
            teacher=given,
            losses={"hard": HardTargetLoss(weight=0.1), "soft": RecordTeacherLogits()},
        )
        assert loaded.teacher_cache == cache
        found = make_trainer().test(loaded, DigitsDataModule(batch_size=200), verbose=False)[0]
        assert found["test/accuracy"] == expected["test/accuracy"]
        assert ("test/agreement" in found) == (given is not None)
        if given is not None:
            assert found["test/agreement"] == pytest.approx(expected["test/agreement"], abs=0.01)


def test_a_module_can_be_fitted_again_with_other_views(make_trainer: Trainers, teacher: nn.Module) -> None:
    """The logits of the first views are discarded."""
    run = Run(make_trainer, teacher, True, epochs=2)
    soft_loss = run.soft_loss
    soft_loss.logits.clear()
    make_trainer(max_epochs=1, limit_val_batches=0).fit(
        run.module, DigitsDataModule(batch_size=200, views=2, view_seed=3)
    )
    fresh = Run(make_trainer, teacher, True, epochs=1, data={"view_seed": 3})
    assert torch.equal(run.logits, fresh.logits)

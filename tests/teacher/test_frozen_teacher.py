"""How a teacher is asked: through a folded copy, and through its cached logits of fixed views."""

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
from kd_lightning.data.image_set import ImageSet
from kd_lightning.features import Outputs
from kd_lightning.losses import DistillationLoss, HardTargetLoss, HintLoss, SoftTargetLoss
from kd_lightning.networks import DataConfig, EnsembleTeacher, ResNet, resnet20, set_data_config, wrn_16_2
from kd_lightning.teacher.frozen_teacher import FrozenTeacher

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]

CPU = torch.device("cpu")
TRAINING_IMAGES = 1150


def seasoned(network: nn.Module) -> nn.Module:
    """With statistics and scales in its batch norms as training leaves them, so that folding has something to do."""
    generator = torch.Generator().manual_seed(1)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            state = part.state_dict()
            for name, low, high in (("running_var", 0.5, 2), ("weight", 0.5, 1.5), ("bias", -0.3, 0.3)):
                state[name].uniform_(low, high, generator=generator)
            state["running_mean"].uniform_(-0.3, 0.3, generator=generator)
    return network.eval()


def norms(network: nn.Module | None) -> int:
    assert network is not None
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


# --- the folded copy


def _torchvision_resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


@pytest.mark.parametrize(("build", "left"), [(resnet20, 0), (wrn_16_2, 6), (_torchvision_resnet18, 0)])
def test_a_folded_copy_says_what_the_network_says(build: Callable[[], nn.Module], left: int) -> None:
    """In a wide resnet a norm stands before its convolution, so that some have nothing to be folded into."""
    network = seasoned(build())
    before = copy.deepcopy(network.state_dict())
    teaching = FrozenTeacher(network, [])
    teaching.optimize_for_inference(torch.rand(4, 3, 32, 32), None, compile=False)
    assert teaching.folded
    assert norms(teaching.inference_network) == left < norms(network)
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
    found = teaching(images).logits
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert teaching.inference_network is not teaching.network
    with torch.no_grad():
        assert torch.equal(teaching(images).logits, found)
    for held in (network, teaching.network):
        assert held.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())


class Untraceable(nn.Module):
    """Its way depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)
        self.bn = nn.BatchNorm2d(10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.bn(self.conv(images))
        return maps.mean((2, 3)) if images.mean() > 0 else maps.amax((2, 3))


class Misled(nn.Module):
    """What traces it is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            images = 3 * images
        return self.conv(images).mean((2, 3))


class Shared(nn.Module):
    """One convolution before two norms: it cannot be folded into both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)
        self.bn1 = nn.BatchNorm2d(10)
        self.bn2 = nn.BatchNorm2d(10)

    def forward(self, images: Tensor) -> Tensor:
        return (self.bn1(self.conv(images)) + self.bn2(self.conv(-images))).mean((2, 3))


@pytest.mark.parametrize("kind", [Untraceable, Misled, Shared])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_network_that_cannot_be_folded_is_asked_as_it_is(kind: type[nn.Module], dtype: torch.dtype | None) -> None:
    network = seasoned(kind())
    teaching = FrozenTeacher(network, [])
    teaching.optimize_for_inference(torch.rand(4, 1, 8, 8), dtype, compile=False)
    assert not teaching.folded
    for name, value in teaching.network.state_dict().items():
        assert value.dtype == network.state_dict()[name].dtype
        assert torch.equal(value, network.state_dict()[name])
    for images in (torch.rand(8, 1, 8, 8), -torch.rand(8, 1, 8, 8)):
        with torch.no_grad():
            expected = network(images)
        tolerance: dict[str, Any] = {"rtol": 0.05, "atol": 0.05} if dtype else {}
        torch.testing.assert_close(teaching(images).logits, expected, **tolerance)


def test_a_copy_is_not_made_where_layers_are_read(small: Networks) -> None:
    teaching = FrozenTeacher(small(), ["layer1"])
    teaching.optimize_for_inference(torch.rand(4, 1, 8, 8), torch.bfloat16, compile=False)
    assert teaching.inference_network is None
    assert not teaching.folded
    said = teaching(torch.rand(2, 1, 8, 8))
    assert said.logits.dtype == torch.float32
    assert set(said.features) == {"layer1"}


def test_a_loss_on_features_has_no_copy_made(small: Networks, make_trainer: Trainers) -> None:
    losses: dict[str, DistillationLoss] = {"hard": HardTargetLoss(), "hint": HintLoss(student_layers=["layer1"])}
    module = DistillationModule(small(), small(8), losses=losses, teacher_check="off")
    make_trainer(fast_dev_run=True).fit(module, DigitsDataModule(batch_size=128))
    assert module.frozen_teacher is not None
    assert module.frozen_teacher.inference_network is None


def test_in_mixed_precision_the_copy_is_bfloat16_and_the_teacher_does_not_move(
    small: Networks, make_trainer: Trainers
) -> None:
    given = seasoned(small(8))
    before = copy.deepcopy(given.state_dict())
    module = DistillationModule(small(), given, teacher_check="off")
    make_trainer(precision="bf16-mixed", limit_train_batches=2, limit_val_batches=1).fit(
        module, DigitsDataModule(batch_size=128)
    )
    teaching = module.frozen_teacher
    assert teaching is not None
    assert teaching.inference_network is not None
    assert teaching.folded
    assert {weight.dtype for weight in teaching.inference_network.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in teaching.inference_network.parameters())
    assert module.teacher is not None
    for name, value in module.teacher.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert "inference_network" not in " ".join([*module.state_dict(), *dict(module.named_modules())])
    images = torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        expected = given(images)
    said = module.reference_logits(images)
    assert said is not None
    assert said.dtype == torch.float32
    torch.testing.assert_close(said, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


# --- runs


class Spy(SoftTargetLoss):
    """Remembers what the teacher said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Tensor] = []

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        self.said.append(teacher.logits.clone())
        return super().forward(student, teacher, labels)


class Watch(pl.Callback):
    """Counts the images that a teacher is asked about, and keeps the losses and the images' ids."""

    def __init__(self) -> None:
        self.asked, self.asked_in_validation = 0, 0
        self.losses: list[float] = []
        self.ids: list[Tensor] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch > 0 and self.losses:
            return

        def count(network: nn.Module, arguments: Any, logits: Tensor) -> None:
            self.asked += len(logits) if trainer.training else 0
            self.asked_in_validation += 0 if trainer.training else len(logits)

        pl_module.teacher.register_forward_hook(count)  # not asked itself, or counted as well
        pl_module.frozen_teacher.inference_network.register_forward_hook(count)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.ids.append(batch[2])


class Run:
    """A student of the digits with V views, and what was seen on the way."""

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
        self.watch, self.spy = Watch(), Spy()
        losses = {"hard": HardTargetLoss(weight=0.1), "soft": self.spy} if losses is None else losses
        self.module = DistillationModule(
            self.student,
            teacher,
            losses=losses,
            teacher_check="off",
            teacher_cache=cache,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05),
        )
        self.trainer = trainer(
            max_epochs=epochs, callbacks=[self.watch, *callbacks], **{"limit_val_batches": 0} | options
        )
        self.data = DigitsDataModule(**{"batch_size": 200, "views": views} | (data or {}))
        self.trainer.fit(self.module, self.data, ckpt_path=path, weights_only=True if path else None)

    @property
    def said(self) -> Tensor:
        return torch.cat(self.spy.said)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()


@pytest.fixture
def teacher(small: Networks) -> nn.Module:
    """Seasoned, with logits up to 5, of which float16 rounds off up to 0.002; it names every digit."""
    network = seasoned(small(8))
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


def test_a_cached_run_is_the_online_run(make_trainer: Trainers, teacher: nn.Module, cache: bool | str) -> None:
    online, cached = Run(make_trainer, teacher, False, epochs=4), Run(make_trainer, teacher, cache, epochs=4)
    assert len(online.watch.losses) == len(cached.watch.losses) == 4 * 5
    assert all(torch.equal(a, b) for a, b in zip(online.watch.ids, cached.watch.ids, strict=True))
    assert online.said.abs().max() > 5
    assert torch.equal(cached.said, cached.said.half().float())
    torch.testing.assert_close(cached.said, online.said, rtol=1.001 * 2**-11, atol=1e-5)
    # a batch of another size may round the last bit of float32 otherwise, and then at times that of float16
    assert (cached.said == online.said.half().float()).float().mean() > 0.99
    assert cached.watch.losses == pytest.approx(online.watch.losses, rel=1e-3)
    for name, value in online.weights.items():
        torch.testing.assert_close(cached.weights[name], value, rtol=2e-3, atol=2e-3)
    assert online.watch.asked == 4 * 5 * 200


def test_a_cached_run_is_the_online_run_in_mixed_precision(make_trainer: Trainers, teacher: nn.Module) -> None:
    online, cached = (Run(make_trainer, teacher, where, precision="bf16-mixed") for where in (False, True))
    assert torch.equal(cached.said, online.said)  # bfloat16 has fewer digits than float16
    assert cached.watch.losses == online.watch.losses


def test_a_teacher_with_other_statistics_is_asked_in_its_own(make_trainer: Trainers, teacher: nn.Module) -> None:
    set_data_config(teacher, DataConfig.of((0.5,), (0.2,)))
    plain = copy.deepcopy(teacher)
    set_data_config(plain, DataConfig())
    online, cached = (Run(make_trainer, teacher, where, epochs=1) for where in (False, True))
    torch.testing.assert_close(cached.said, online.said, rtol=1.001 * 2**-11, atol=1e-5)
    assert not torch.allclose(Run(make_trainer, plain, True, epochs=1).said, cached.said, atol=0.1)


@pytest.mark.parametrize(("epochs", "views"), [(1, 3), (2, 3), (3, 3), (5, 2), (3, 1)])
def test_the_teacher_is_asked_once_about_each_view(
    make_trainer: Trainers, teacher: nn.Module, epochs: int, views: int
) -> None:
    run = Run(make_trainer, teacher, True, epochs=epochs, views=views, limit_val_batches=1.0)
    assert run.watch.asked == min(epochs, views) * TRAINING_IMAGES
    assert len(run.watch.losses) == epochs * 5


def test_the_teacher_is_asked_once_about_each_validation_image(make_trainer: Trainers, teacher: nn.Module) -> None:
    online, cached = (Run(make_trainer, teacher, where, limit_val_batches=1.0) for where in (False, True))
    images = len(cached.data.splits.val_samples)
    assert (online.watch.asked_in_validation, cached.watch.asked_in_validation) == (3 * images, images)
    for name in ("val/agreement", "val/kl"):
        expected = float(online.trainer.callback_metrics[name])
        assert float(cached.trainer.callback_metrics[name]) == pytest.approx(expected, rel=2e-3)


def test_the_cache_covers_what_drop_last_leaves_out_and_no_more(make_trainer: Trainers, teacher: nn.Module) -> None:
    """Batches of 800: a step an epoch, of other images each time."""
    run = Run(make_trainer, teacher, True, epochs=4, data={"batch_size": 800})
    assert run.watch.asked == 2 * TRAINING_IMAGES
    assert run.module.frozen_teacher is not None
    cache = run.module.frozen_teacher.cache
    assert cache is not None
    cache.load(1, CPU)
    train = run.data.train_samples
    said = cache(train * 2 + 1)
    assert (said.abs().sum(1) > 0).all()
    shown = run.data.augment(next(iter(run.data.view_dataloader(1))))
    with torch.no_grad():
        expected = teacher(shown.images[:3])  # a few at a time
    torch.testing.assert_close(cache(shown.ids[:3]), expected, rtol=1e-3, atol=1e-3)


def test_a_folder_serves_the_next_student(make_trainer: Trainers, teacher: nn.Module, tmp_path: Path) -> None:
    folder = str(tmp_path / "logits")
    first = Run(make_trainer, teacher, folder, epochs=2)
    again = Run(make_trainer, teacher, folder, epochs=2)
    other = Run(make_trainer, teacher, folder, epochs=3, seed=7, data={"batch_size": 100})
    assert first.watch.asked == 2 * TRAINING_IMAGES
    assert again.watch.asked == other.watch.asked == 0
    assert torch.equal(first.said, again.said)
    assert all(torch.equal(value, again.weights[name]) for name, value in first.weights.items())
    assert other.watch.losses[:5] != first.watch.losses[:5]
    said = dict(zip(torch.cat(first.watch.ids).tolist(), first.said, strict=True))
    for name, logits in zip(torch.cat(other.watch.ids).tolist(), other.said, strict=True):
        assert name not in said or torch.equal(said[name], logits)


def test_a_folder_is_filled_by_as_many_runs_as_it_takes(
    make_trainer: Trainers, teacher: nn.Module, tmp_path: Path
) -> None:
    folder = str(tmp_path / "logits")
    assert Run(make_trainer, teacher, folder, epochs=1, views=3).watch.asked == TRAINING_IMAGES
    second = Run(make_trainer, teacher, folder, epochs=4, views=3)
    assert second.watch.asked == 2 * TRAINING_IMAGES
    file = sorted((tmp_path / "logits").glob("*.float16"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    third = Run(make_trainer, teacher, folder, epochs=3, views=3)
    assert third.watch.asked == TRAINING_IMAGES
    assert torch.equal(third.said, second.said[: len(third.said)])


def changed(teacher: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(teacher)
    teacher.state_dict()["fc.bias"][3] += 0.001
    return teacher


def another_running_mean(teacher: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(teacher)
    teacher.state_dict()["bn1.running_mean"][0] += 0.001
    return teacher


@pytest.mark.parametrize(
    ("alter", "options", "named"),
    [
        (changed, {}, "teacher"),
        (another_running_mean, {}, "teacher"),
        (copy.deepcopy, {"data": {"view_seed": 1}}, "view_seed"),
        (copy.deepcopy, {"data": {"augmentation": Augmentation(padding=2)}}, "augmentation"),
        (copy.deepcopy, {"data": {"mean": (0.3,)}}, "statistics"),
        (copy.deepcopy, {"data": {"val_fraction": 0.3}}, "images"),
        (copy.deepcopy, {"data": {"seed": 1}}, "images"),
        (copy.deepcopy, {"views": 3}, "views"),
        (copy.deepcopy, {"precision": "bf16-mixed"}, "precision"),
    ],
)
def test_a_folder_of_other_logits_is_refused_with_the_reason(
    make_trainer: Trainers, teacher: nn.Module, tmp_path: Path, alter: Any, options: dict[str, Any], named: str
) -> None:
    folder = str(tmp_path / "logits")
    small_run: dict[str, Any] = {"epochs": 1, "limit_train_batches": 1}
    Run(make_trainer, teacher, folder, **small_run)
    watch = Steps()
    with pytest.raises(ValueError, match=rf"were computed differently \(different: {named}\); name another folder"):
        Run(make_trainer, alter(teacher), folder, **small_run | options, callbacks=[watch])
    assert watch.steps == 0


def with_statistics(teacher: nn.Module) -> nn.Module:
    set_data_config(teacher, DataConfig.of((0.5,), (0.2,)))
    return teacher


def of_probabilities(teacher: EnsembleTeacher) -> nn.Module:
    return EnsembleTeacher(list(copy.deepcopy(teacher.networks)), average="probabilities")


def with_shares(teacher: EnsembleTeacher) -> nn.Module:
    return EnsembleTeacher(list(copy.deepcopy(teacher.networks)), weights=[1.0, 9.0])


@pytest.mark.parametrize("alter", [with_statistics, of_probabilities, with_shares])
def test_a_folder_of_a_teacher_of_the_same_weights_that_says_something_else_is_refused(
    make_trainer: Trainers, small: Networks, teacher: nn.Module, tmp_path: Path, alter: Any
) -> None:
    if alter is not with_statistics:
        teacher = EnsembleTeacher([teacher, seasoned(small(6))])
    folder = str(tmp_path / "logits")
    Run(make_trainer, teacher, folder, epochs=1)
    with pytest.raises(ValueError, match="were computed differently"):
        Run(make_trainer, alter(teacher), folder, epochs=1)


# --- what is refused


class Steps(pl.Callback):
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
        (
            {"data": {"augmentation": Augmentation(mixup=0.2)}},
            "mixup and CutMix create new images in each epoch; set both to 0",
        ),
        (
            {"data": {"augmentation": Augmentation(cutmix=1.0)}},
            "mixup and CutMix create new images in each epoch; set both to 0",
        ),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_cannot_be_cached_is_refused_before_the_first_step(
    make_trainer: Trainers, teacher: nn.Module, options: dict[str, Any], reason: str, tmp_path: Path, on_disk: bool
) -> None:
    watch = Steps()
    where = str(tmp_path / "logits") if on_disk else True
    with pytest.raises(ValueError, match=r"^The teacher's logits cannot be cached: ") as caught:
        Run(make_trainer, teacher, where, callbacks=[watch], **copy.deepcopy(options))
    said = f"The teacher's logits cannot be cached: {reason}, or set teacher_cache=False."
    assert str(caught.value) == said
    assert watch.steps == 0
    assert not (tmp_path / "logits").exists()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("ours", [False, True])
def test_plain_loaders_cannot_be_cached(
    make_trainer: Trainers, small: Networks, teacher: nn.Module, ours: bool
) -> None:
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    loader = DigitsDataModule(views=2).train_dataloader() if ours else DataLoader(TensorDataset(images, labels), 4)
    module = DistillationModule(small(), teacher, teacher_check="off", teacher_cache=True)
    trainer = make_trainer()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        trainer.fit(module, loader, loader)
    assert "\n" not in str(caught.value)
    if not ours:
        assert str(caught.value).startswith("The teacher's logits cannot be cached: each epoch has new views")
    assert trainer.global_step == 0


def test_a_cache_is_not_needed_to_evaluate(make_trainer: Trainers, small: Networks, teacher: nn.Module) -> None:
    losses: dict[str, DistillationLoss] = {"hint": HintLoss(student_layers=["layer1"])}
    module = DistillationModule(small(), teacher, losses=losses, teacher_cache=True)
    assert "test/agreement" in make_trainer().test(module, DigitsDataModule(), verbose=False)[0]


# --- two processes


class Keeper(pl.Callback):
    """Writes what a rank holds of each view, how many images it asked about and how many views it put."""

    def __init__(self, folder: Path, watch: Watch) -> None:
        self.folder, self.watch, self.put = folder, watch, 0
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
        state = {"views": torch.stack(views), "asked": self.watch.asked, "put": self.put}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*")
@pytest.mark.filterwarnings("ignore:.*barrier.*")
@pytest.mark.filterwarnings("ignore:.*nn.parallel.*")
def test_the_ranks_share_the_work_and_hold_the_same(
    make_trainer: Trainers, teacher: nn.Module, cache: bool | str, tmp_path: Path
) -> None:
    """1,121 images divide by neither 2 nor the batches."""
    held = {}
    for world in (1, 2):
        kept = tmp_path / str(world)
        where = cache if isinstance(cache, bool) else f"{cache}{world}"
        options = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {"devices": 1}
        watch = Watch()
        keeper = Keeper(kept, watch)
        data = {"val_fraction": 0.22, "batch_size": 200 // world}
        Run(make_trainer, teacher, where, epochs=3, data=data, callbacks=[watch, keeper], **options)
        held[world] = [torch.load(kept / f"{rank}.pt", weights_only=True) for rank in range(world)]
    (one,), (first, second) = held[1], held[2]
    assert one["views"].shape == (2, 1121, 10)
    assert torch.equal(first["views"], second["views"])
    torch.testing.assert_close(first["views"], one["views"], rtol=1e-3, atol=1e-3)
    assert (one["views"].abs().sum(2) > 0).all()
    assert (one["asked"], first["asked"], second["asked"]) == (2 * 1121, 2 * 561, 2 * 560)
    assert (one["put"], first["put"], second["put"]) == (2, 2, 2 if cache is True else 0)  # one rank writes a file
    if not isinstance(cache, bool):
        assert sorted(path.name for path in Path(f"{cache}2").iterdir()) == sorted(
            path.name for path in Path(f"{cache}1").iterdir()
        )
        later = Run(make_trainer, teacher, f"{cache}2", epochs=3, data={"val_fraction": 0.22})
        assert later.watch.asked == 0


# --- checkpoints


class StopAfter(pl.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def test_a_cached_run_goes_on_to_the_same_bits(
    make_trainer: Trainers, teacher: nn.Module, cache: bool | str, tmp_path: Path
) -> None:
    def at(name: str) -> bool | str:
        return cache if isinstance(cache, bool) else f"{cache}-{name}"

    whole = Run(make_trainer, teacher, at("whole"), epochs=5, views=3)
    part = Run(make_trainer, teacher, at("part"), epochs=5, views=3, callbacks=[StopAfter(1)])
    part.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert len(part.watch.losses) == 10
    resumed = Run(make_trainer, teacher, at("part"), epochs=5, views=3, seed=9, path=tmp_path / "last.ckpt")
    assert resumed.watch.losses == whole.watch.losses[10:]
    for name, value in whole.weights.items():
        assert torch.equal(resumed.weights[name], value), name
    assert not torch.equal(part.weights["network.fc.weight"], whole.weights["network.fc.weight"])
    # views 2, 0, 1 are shown; a folder has kept 0 and 1
    assert resumed.watch.asked == (3 if isinstance(cache, bool) else 1) * TRAINING_IMAGES


def test_a_module_with_a_cache_is_loaded_and_tested(
    make_trainer: Trainers, small: Networks, teacher: nn.Module, cache: bool | str, tmp_path: Path
) -> None:
    run = Run(make_trainer, teacher, cache, epochs=2)
    run.trainer.save_checkpoint(tmp_path / "student.ckpt")
    content = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert content["hyper_parameters"]["teacher_cache"] == cache
    assert content["state_dict"].keys() == {f"network.{name}" for name in run.student.state_dict()}
    expected = run.trainer.test(run.module, run.data, verbose=False)[0]
    assert expected["test/agreement"] < 1
    for again in (None, teacher):
        loaded = DistillationModule.load_from_checkpoint(
            tmp_path / "student.ckpt",
            student=small(),
            teacher=again,
            losses={"hard": HardTargetLoss(weight=0.1), "soft": Spy()},
        )
        assert loaded.teacher_cache == cache
        found = make_trainer().test(loaded, DigitsDataModule(batch_size=200), verbose=False)[0]
        assert found["test/accuracy"] == expected["test/accuracy"]
        assert ("test/agreement" in found) == (again is not None)
        if again is not None:
            assert found["test/agreement"] == pytest.approx(expected["test/agreement"], abs=0.01)


def test_a_module_is_fitted_twice(make_trainer: Trainers, teacher: nn.Module) -> None:
    """The second time with other views; the logits of the first are gone."""
    run = Run(make_trainer, teacher, True, epochs=2)
    spy = run.spy
    spy.said.clear()
    make_trainer(max_epochs=1, limit_val_batches=0).fit(
        run.module, DigitsDataModule(batch_size=200, views=2, view_seed=3)
    )
    fresh = Run(make_trainer, teacher, True, epochs=1, data={"view_seed": 3})
    assert torch.equal(run.said, fresh.said)

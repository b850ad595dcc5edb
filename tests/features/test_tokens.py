"""Tokens of transformers as maps: the grid by arithmetic or declared, and every loss on features over them."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.features import Features, FeatureTap, Grid, Outputs, find_grid, maps_to_tokens, tokens_to_maps
from kd_lightning.losses import (
    AttentionLoss,
    ContrastiveLoss,
    CorrelationLoss,
    DistillationLoss,
    HardTargetLoss,
    HintLoss,
    NeuronSelectivityLoss,
    OFALoss,
    ProbabilisticLoss,
    RelationalLoss,
    ReviewLoss,
    RSDLoss,
    SimilarityLoss,
    SRDLoss,
    VariationalLoss,
    ViTKDLoss,
    VkDLoss,
    WKDFeatureLoss,
)
from kd_lightning.networks import resnet20


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [
        (1, Grid(0, 1, 1)),
        (196, Grid(0, 14, 14)),
        (197, Grid(1, 14, 14)),
        (198, Grid(2, 14, 14)),
        (200, Grid(4, 14, 14)),
        (201, Grid(5, 14, 14)),
        (5, Grid(1, 2, 2)),
        (261, Grid(5, 16, 16)),
        (199, None),
        (12, None),
        (2, None),
        (3, None),
        (0, None),
    ],
)
def test_prefix_tokens_are_found_by_the_arithmetic_of_a_square_grid(tokens: int, grid: Grid | None) -> None:
    assert find_grid(tokens) == grid


@pytest.mark.parametrize(
    ("tokens", "image_size", "grid"),
    [
        (4 * 6, (64, 96), Grid(0, 4, 6)),
        (1 + 4 * 6, (64, 96), Grid(1, 4, 6)),  # without the size 5 x 5
        (5 + 6 * 4, (96, 64), Grid(5, 6, 4)),
        (2 + 16 * 9, (256, 144), Grid(2, 16, 9)),
        (5 + 2 * 2, (32, 32), Grid(5, 2, 2)),  # not 3 x 3, since 32 is no multiple of 3
        (1 + 4 * 6, (70, 100), Grid(1, 4, 6)),  # patches of 16 that leave a rest
        (1 + 5 * 7, (70, 100), Grid(1, 5, 7)),  # the same with padding
        (1 + 18 * 18, (224, 224), Grid(1, 18, 18)),  # patches of 16 every 12 pixels
        (25, (64, 100), Grid(1, 4, 6)),
        (60, (64, 96), None),
    ],
)
def test_the_grid_follows_from_the_size_of_the_image(
    tokens: int, image_size: tuple[int, int], grid: Grid | None
) -> None:
    assert find_grid(tokens, image_size=image_size) == grid


def test_a_declared_prefix_is_tried_first() -> None:
    assert find_grid(25) == Grid(0, 5, 5)
    assert find_grid(25, prefix=9) == Grid(9, 4, 4)
    assert find_grid(25, image_size=(32, 32), prefix=9) == Grid(9, 4, 4)
    assert find_grid(16, prefix=1) == Grid(0, 4, 4)  # of a layer after which the prefix is gone
    assert find_grid(7, prefix=6) == Grid(6, 1, 1)
    assert find_grid(7) is None


def test_tokens_become_maps_row_by_row_and_back() -> None:
    tokens = torch.randn(2, 7, 3)
    maps = tokens_to_maps(tokens, Grid(1, 2, 3))
    for row in range(2):
        for column in range(3):
            assert maps[:, :, row, column].equal(tokens[:, 1 + 3 * row + column])
    assert maps_to_tokens(maps).equal(tokens[:, 1:])


def vit(**options: Any) -> Any:
    settings: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 32, **settings, **options})


def deit() -> nn.Module:
    settings: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, **settings)


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=2,
        embed_dim=12,
        depths=(1, 1),
        num_heads=(1, 1),
        num_classes=10,
    )


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24), num_classes=10)


def mixer() -> nn.Module:
    return timm.models.mlp_mixer.MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=24, num_classes=10)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str]]] = {
    "cnn": (lambda: resnet20(num_classes=10), ("layer2", "layer3")),
    "vit": (vit, ("blocks.0", "norm")),
    "vit with registers": (lambda: vit(reg_tokens=4), ("blocks.0", "norm")),
    "deit": (deit, ("blocks.0", "norm")),
    "swin": (swin, ("layers.0", "layers.1")),
    "convnext": (convnext, ("stages.1", "stages.2")),
    "mixer": (mixer, ("blocks.0", "norm")),
}
PAIRS = [("cnn", "vit"), ("vit", "cnn"), ("cnn", "deit"), ("deit", "cnn"), ("cnn", "vit with registers")]
PAIRS += [("cnn", "swin"), ("swin", "cnn"), ("cnn", "convnext"), ("convnext", "cnn"), ("mixer", "vit")]
PAIRS += [("cnn", "mixer"), ("mixer", "cnn"), ("vit", "swin"), ("swin", "vit"), ("vit", "convnext")]


def feature_losses(student: tuple[str, str], teacher: tuple[str, str]) -> dict[str, DistillationLoss]:
    """Return each loss on features, for two layers of each network."""
    maps: dict[str, Any] = {"student_layers": student, "teacher_layers": teacher}
    last: dict[str, Any] = {"student_layers": student[1:], "teacher_layers": teacher[1:]}
    return {
        "hint": HintLoss(**maps),
        "attention": AttentionLoss(**maps),
        "neuron_selectivity": NeuronSelectivityLoss(**maps),
        "similarity": SimilarityLoss(**last),
        "probabilistic": ProbabilisticLoss(**last),
        "relational": RelationalLoss(**last),
        "correlation": CorrelationLoss(**last),
        "variational": VariationalLoss(**maps),
        "review": ReviewLoss(**maps),
        "contrastive": ContrastiveLoss(queue_size=8, **last),
        "wkd_f": WKDFeatureLoss(**maps),
        "rsd": RSDLoss(**last),
        "ofa": OFALoss(student_layers=student),
        "vkd": VkDLoss(**last),
        "vitkd": ViTKDLoss(**maps),
        "srd": SRDLoss(**last),
    }


def read(network: nn.Module, layers: tuple[str, ...], images: torch.Tensor) -> Outputs:
    tap = FeatureTap(network, layers)
    tap.find_channels_last(images)
    return tap(images)


def grids(outputs: Outputs) -> dict[str, Grid]:
    assert isinstance(outputs.features, Features)
    return outputs.features.grids


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_loss_on_features_takes_every_kind_of_network(student: str, teacher: str) -> None:
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([3, 1, -1, 7])
    (build, layers), (build_teacher, teacher_layers) = NETWORKS[student], NETWORKS[teacher]
    network, taught_by = build(), build_teacher()
    said = read(taught_by, teacher_layers, images)
    for name, loss in feature_losses(layers, teacher_layers).items():
        taught = read(network, layers, images)
        loss.check(taught, said)
        loss.build(taught, said, student_network=network, teacher_network=taught_by)
        if name == "contrastive":
            loss(taught, said, labels)  # whose queue is empty in the first step
        value = loss(taught, said, labels)
        network.zero_grad()
        value.backward()
        assert value.isfinite(), name
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0, name
        assert all(gradient.isfinite().all() for gradient in gradients), name


@pytest.mark.parametrize(("student", "teacher"), [("cnn", "vit"), ("vit", "cnn"), ("swin", "mixer")])
def test_they_train_together(student: str, teacher: str, make_trainer: Callable[..., pl.Trainer]) -> None:
    (build, layers), (build_teacher, teacher_layers) = NETWORKS[student], NETWORKS[teacher]
    losses = {"hard": HardTargetLoss(), **feature_losses(layers, teacher_layers)}
    for loss in losses.values():
        loss.weight = 1e-3
    module = DistillationModule(build(), build_teacher(), losses=losses, teacher_check="off", learning_rate=1e-3)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 10), batch_size=4)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader, loader)
    assert all(trainer.callback_metrics[f"train/{name}"].isfinite() for name in losses)
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_grids_of_images_that_are_not_square_are_kept_for_learned_parts(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Any
) -> None:
    """With 2 x 4 patches and a class token a square grid would be 3 x 3."""

    def module(**options: Any) -> DistillationModule:
        losses = {"hard": HardTargetLoss(), "hint": HintLoss(student_layers=["layer3"], teacher_layers=["norm"])}
        return DistillationModule(resnet20(), losses=losses, teacher_check="off", **options)

    fitted = module(teacher=vit(img_size=(32, 64), patch_size=16))
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 64), torch.arange(4)), batch_size=4)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(fitted, loader, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    shapes = fitted.losses.shapes
    assert shapes is not None
    assert shapes[0] is not None and "grids" not in shapes[0]  # noqa: PT018
    assert shapes[1] is not None and shapes[1]["grids"] == {"norm": [1, 2, 4]}  # noqa: PT018
    restored = module()
    make_trainer(max_epochs=1).validate(restored, loader, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    for name, value in fitted.losses.state_dict().items():
        assert restored.losses.state_dict()[name].equal(value)


def test_the_map_of_tokens_is_that_of_their_places() -> None:
    network, images = vit(), torch.rand(2, 3, 32, 32)
    outputs = read(network, ("norm",), images)
    assert grids(outputs) == {"norm": Grid(1, 4, 4)}
    tokens, maps = outputs.features["norm"], tokens_to_maps(outputs.features["norm"], Grid(1, 4, 4))
    assert maps[:, :, 1, 2].equal(tokens[:, 1 + 4 + 2])
    loss = HintLoss(student_layers=["a"], regressor=False)
    zeros = Outputs(outputs.logits, {"a": torch.zeros(2, 24, 4, 4)})
    said = Outputs(outputs.logits, {"a": tokens.detach()})
    loss.build(zeros, said)
    torch.testing.assert_close(loss(zeros, said, torch.tensor([0, 1])), tokens[:, 1:].square().mean())


def test_a_declared_prefix_is_read_from_the_network() -> None:
    network, images = vit(), torch.rand(2, 3, 32, 32)
    network.blocks.register_forward_hook(lambda _, __, tokens: torch.cat([tokens[:, :1]] * 9 + [tokens[:, 1:]], 1))
    assert grids(read(network, ("blocks",), images)) == {"blocks": Grid(0, 5, 5)}
    network.num_prefix_tokens = 9
    assert grids(FeatureTap(network, ["blocks"])(images)) == {"blocks": Grid(9, 4, 4)}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["hint", "vitkd"])
def test_reading_tokens_can_be_compiled(name: str, known: bool) -> None:
    """With grids that the tap has found, and by arithmetic alone."""
    student = {"a": torch.randn(4, 9 if known else 5, 3), "b": torch.randn(4, 4, 3)}
    teacher = {"a": torch.randn(4, 17, 6), "b": torch.randn(4, 6, 4, 4)}
    loss = feature_losses(("a", "b"), ("a", "b"))[name]
    outputs = Outputs(torch.randn(4, 5), Features(student, {"a": Grid(1, 2, 4)}) if known else student)
    said = Outputs(torch.randn(4, 5), teacher)
    loss.build(outputs, said)
    torch.compiler.reset()
    found = []
    for run in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        torch.manual_seed(0)
        found.append(run(outputs, said, torch.tensor([0, 1, 2, -1])))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["hint", "attention"])
def test_tokens_that_are_no_grid_are_refused_by_name(name: str) -> None:
    loss = feature_losses(("a", "b"), ("a", "b"))[name]
    maps, tokens = (2, 3, 4, 4), (2, 12, 3)
    student = Outputs(torch.zeros(2, 5), {"a": torch.zeros(maps), "b": torch.zeros(maps)})
    teacher = Outputs(torch.zeros(2, 5), {"a": torch.zeros(maps), "b": torch.zeros(tokens)})
    takes = r"maps \(B, C, H, W\) or \(B, H, W, C\),( or)? tokens \(B, N, C\)"
    with pytest.raises(
        ValueError,
        match=rf"^{type(loss).__name__} compares {takes}( or vectors \(B, C\))?, but the teacher's layer 'b' returns "
        r"\(2, 12, 3\), and 12 tokens are no grid, with or without prefix tokens; name a layer that does, or set "
        r"num_prefix_tokens of the network\.$",
    ):
        (loss.build if name == "hint" else loss.check)(student, teacher)

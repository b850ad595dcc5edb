"""Students and teachers with two heads: DeiT's distillation token, hard and soft."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from random_inputs import random_outputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.features import FeatureTap, Outputs, logits_of
from kd_lightning.losses import (
    DistillationLoss,
    HardDistillationLoss,
    HardTargetLoss,
    HeadLoss,
    HintLoss,
    Objective,
    SoftTargetLoss,
    hard_distillation_loss,
)
from kd_lightning.networks import ResNet, resnet20

LABELS = torch.tensor([3, 1, -1, 0])
Trainers = Callable[..., pl.Trainer]


def deit(**options: Any) -> Any:
    settings: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, **{**settings, **options})


def token(hard: bool) -> DistillationLoss:
    return HardDistillationLoss() if hard else SoftTargetLoss(3.0, weight=0.5)


def deits_objective(hard: bool = True) -> dict[str, DistillationLoss]:
    return {
        "hard": HeadLoss(HardTargetLoss(weight=0.5), student_head="head"),
        "token": HeadLoss(token(hard), student_head="head_dist"),
    }


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_class() -> None:
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    rows = [s.exp().sum().log() - s[t.argmax()] for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(hard_distillation_loss(student, teacher), torch.stack(rows).mean())
    shifted = hard_distillation_loss(student + 7, 3 * teacher - 2)
    torch.testing.assert_close(shifted, hard_distillation_loss(student, teacher))


@pytest.mark.parametrize("hard", [True, False])
def test_the_objective_of_deit(hard: bool) -> None:
    """As written in https://github.com/facebookresearch/deit, with the batch mean of the soft form."""
    student, teacher = deit(), resnet20()
    images = torch.rand(4, 3, 32, 32)
    outputs = FeatureTap(student, ["head", "head_dist"])(images)
    said = FeatureTap(teacher)(images)
    objective = Objective(deits_objective(hard), accepts=(DistillationLoss,))
    objective.build(outputs, said, network=student, teacher=teacher)
    total, terms = objective(outputs, said, LABELS)
    of_class, of_token = outputs.features["head"], outputs.features["head_dist"]
    torch.testing.assert_close(outputs.logits, (of_class + of_token) / 2)
    base = F.cross_entropy(of_class[[0, 1, 3]], LABELS[[0, 1, 3]])
    if hard:
        learned = F.cross_entropy(of_token, said.logits.argmax(1))
    else:
        ours, theirs = (F.log_softmax(z / 3, dim=1) for z in (of_token, said.logits))
        learned = F.kl_div(ours, theirs, reduction="sum", log_target=True) * 9 / 4
    torch.testing.assert_close(total, 0.5 * base + 0.5 * learned)
    torch.testing.assert_close(terms["token"], learned)
    objective.zero_grad()
    terms["token"].backward(retain_graph=True)
    assert student.head.weight.grad is None
    assert student.head_dist.weight.grad is not None


@pytest.mark.parametrize("distilled_training", [False, True])
def test_a_student_with_a_distillation_token_trains(make_trainer: Trainers, distilled_training: bool) -> None:
    """With timm's ``distilled_training`` too, where the network returns two logits in train mode."""
    student = deit()
    student.set_distilled_training(distilled_training)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    module = DistillationModule(student, resnet20(), losses=deits_objective(), teacher_check="off", learning_rate=0.1)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8)), batch_size=4)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader, loader)
    for name in ("head.weight", "head_dist.weight", "dist_token"):
        assert not student.state_dict()[name].equal(before[name])
    assert all(trainer.callback_metrics[f"train/{name}"].isfinite() for name in module.losses)
    assert not module.losses.teacher_layers, "the teacher's logits can be cached"


def test_the_logits_of_two_heads_are_their_mean_where_the_network_says_so() -> None:
    student, images = deit(), torch.rand(2, 3, 32, 32)
    student.set_distilled_training(True)
    pair = student.train()(images)
    assert isinstance(pair, tuple)
    torch.testing.assert_close(logits_of(pair, student), student.eval()(images))
    student.set_distilled_training(False)
    with pytest.raises(ValueError, match="returns a tuple and not only its logits"):
        logits_of(pair, student)


def test_a_teachers_head_teaches_where_it_is_named() -> None:
    images = torch.rand(4, 3, 32, 32)
    student = FeatureTap(deit(), ["head_dist"])(images)
    teacher = FeatureTap(deit(), ["head_dist"])(images)
    by_output = HeadLoss(SoftTargetLoss(2.0), student_head="head_dist")
    by_token = HeadLoss(SoftTargetLoss(2.0), student_head="head_dist", teacher_head="head_dist")
    assert (by_output.teacher_layers, by_token.teacher_layers) == ((), ("head_dist",))
    of_token = Outputs(student.features["head_dist"])
    for loss, said in ((by_output, teacher.logits), (by_token, teacher.features["head_dist"])):
        torch.testing.assert_close(loss(student, teacher, LABELS), SoftTargetLoss(2.0)(of_token, Outputs(said), LABELS))


def test_the_loss_keeps_its_weight_its_schedule_and_what_it_needs() -> None:
    inner = SoftTargetLoss(2.0, weight=3.0, warmup_epochs=4)
    loss = HeadLoss(inner, student_head="head")
    assert (loss.weight, loss.weight_at(0), loss.weight_at(9)) == (3.0, 0.75, 3.0)
    assert loss.needs_teacher
    assert loss.compares_logits
    assert not HeadLoss(HardTargetLoss(), student_head="head").needs_teacher


class Watching(DistillationLoss):
    """Reads its progress and a feature, and logs."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        self.metrics = {"epoch": self.epoch, "labelled": torch.tensor(float(self.all_labelled))}
        return self.progress * student.logits.sum()


def test_progress_and_metrics_pass_through() -> None:
    loss = HeadLoss(Watching(), student_head="head")
    objective = Objective({"watching": loss}, accepts=(DistillationLoss,))
    outputs = random_outputs(4, head=(5,))
    objective.build(outputs, outputs, network=nn.Linear(1, 1))
    objective.begin_training(all_labelled=True)
    objective.begin_step(progress=0.5, epoch=3, device=torch.device("cpu"))
    total, terms = objective(outputs, outputs, LABELS)
    torch.testing.assert_close(total, outputs.features["head"].sum() / 2)
    assert (terms["watching_epoch"], terms["watching_labelled"]) == (3, 1)


def test_learned_parts_of_the_loss_are_built_and_saved() -> None:
    student, teacher = random_outputs(4, a=(3, 4, 4), head=(5,)), random_outputs(4, a=(6, 4, 4))
    loss = HeadLoss(HintLoss(student_layers=["a"]), student_head="head")
    assert (loss.student_layers, loss.teacher_layers) == (("a", "head"), ("a",))
    loss.check(student, teacher)
    loss.build(student, teacher)
    assert loss.state_dict()["loss.regressors.0.0.weight"].shape == (6, 3, 1, 1)
    assert loss(student, teacher, LABELS).isfinite()


def test_a_layer_that_is_no_head_is_refused(small: Callable[..., ResNet], make_trainer: Trainers) -> None:
    losses: dict[str, DistillationLoss] = {"token": HeadLoss(HardDistillationLoss(), student_head="layer2")}
    module = DistillationModule(small(), small(8), losses=losses, teacher_check="off")
    loader = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4)), batch_size=4)
    with pytest.raises(
        ValueError,
        match=r"^HeadLoss reads logits \(2, 10\) like those of the network, but layer 'layer2' returns \(2, 8, 4, 4\); "
        r"name the last layer of a head\.$",
    ):
        make_trainer().fit(module, loader, loader)

import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_maps

from kd_lightning.features import Outputs
from kd_lightning.losses import NeuronSelectivityLoss, neuron_selectivity_loss


def test_values_by_hand() -> None:
    """Channels that respond to one pixel of two."""
    left, right = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])
    assert neuron_selectivity_loss(left, right) == 1 + 1 - 2 * 0
    both = torch.cat([left, right], dim=1)
    assert neuron_selectivity_loss(both, left) == 0.5 + 1 - 2 * 0.5
    diagonal = torch.tensor([[[[1.0, 1.0]]]])
    assert neuron_selectivity_loss(left, diagonal).item() == pytest.approx(1 + 1 - 2 * 0.5)


def test_is_the_mean_over_the_batch() -> None:
    student, teacher = random_maps()
    rows = [neuron_selectivity_loss(student[[i]], teacher[[i]]) for i in range(3)]
    torch.testing.assert_close(neuron_selectivity_loss(student, teacher), torch.stack(rows).mean())


def test_is_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher = random_maps()
    assert neuron_selectivity_loss(teacher, teacher.clone()).item() == pytest.approx(0, abs=1e-12)
    twice = torch.cat([teacher, teacher], dim=1)
    assert neuron_selectivity_loss(twice, teacher).item() == pytest.approx(0, abs=1e-12)
    assert neuron_selectivity_loss(student, teacher) > 1e-3


def test_invariant_to_order_and_scale_of_channels() -> None:
    student, teacher = random_maps()
    loss = neuron_selectivity_loss(student, teacher)
    factors = torch.randn(3, 4, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(neuron_selectivity_loss(factors * student, -3 * teacher), loss)
    permuted = student[:, torch.randperm(4)], teacher[:, torch.randperm(7)]
    torch.testing.assert_close(neuron_selectivity_loss(*permuted), loss)
    torch.testing.assert_close(neuron_selectivity_loss(student.flip(3), teacher.flip(3)), loss)
    torch.testing.assert_close(neuron_selectivity_loss(teacher, student), loss)


def test_the_larger_map_is_average_pooled() -> None:
    student, _ = random_maps()
    large = torch.randn(3, 7, 10, 18, dtype=torch.float64)
    pooled = F.avg_pool2d(large, (2, 3))
    torch.testing.assert_close(neuron_selectivity_loss(student, large), neuron_selectivity_loss(student, pooled))
    torch.testing.assert_close(neuron_selectivity_loss(large, student), neuron_selectivity_loss(pooled, student))


def test_the_module_passes_its_layers_and_has_the_published_defaults() -> None:
    student, teacher = random_maps()
    loss = NeuronSelectivityLoss()
    assert (loss.weight, loss.warmup_epochs) == (50.0, 0)
    assert loss.student_layers == loss.teacher_layers == ("layer1", "layer2", "layer3")
    loss = NeuronSelectivityLoss(weight=2.0, student_layers=["a"], teacher_layers=["b"], warmup_epochs=2)
    outputs = Outputs(torch.randn(3, 2), {"a": student}), Outputs(torch.randn(3, 2), {"b": teacher})
    loss.build(*outputs)
    assert loss(*outputs, torch.full((3,), -1)) == neuron_selectivity_loss(student, teacher)
    assert (loss.weight, loss.weight_at(0)) == (2.0, 1.0)
    assert loss.state_dict() == {}

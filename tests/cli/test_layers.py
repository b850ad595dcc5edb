from collections.abc import Callable

import pytest

Command = Callable[..., str]


def test_both_networks_are_listed_with_shapes(kd: Command) -> None:
    """Without a trained teacher and without the data."""
    lines = kd("layers", "-c", "cifar10/simkd").splitlines()
    assert lines[0] == "student: ResNet"
    teacher = lines.index("teacher: ResNet")
    student = dict(line.split(maxsplit=1) for line in lines[1:teacher])
    assert student["layer2"] == "(32, 16, 16)"
    assert student["avgpool.projector"] == "(512, 8, 8)"
    assert student["fc"] == "(10,)"
    assert dict(line.split(maxsplit=1) for line in lines[teacher + 1 :])["layer4"] == "(512, 4, 4)"
    assert list(student)[:2] == ["conv1", "bn1"]


def test_a_network_alone_and_another_size(kd: Command) -> None:
    lines = kd("layers", "-c", "cifar100/student", "--image_shape", "[3, 64, 64]").splitlines()
    assert lines[0] == "network: ResNet"
    assert lines[-1].split() == ["fc", "(100,)"]
    assert "  layer3                 (256, 16, 16)" in lines


def test_a_wrong_layer_is_refused_with_the_right_ones(kd: Command) -> None:
    with pytest.raises(SystemExit) as caught:
        kd("layers", "-c", "digits/fitnets", "--model.losses.hint.student_layers", "[layre2]")
    assert str(caught.value).startswith(
        "kd-lightning layers: The student (ResNet) has no layer 'layre2'; choose from (shapes for a"
    )
    assert "layer2 (4, 16, 16)" in str(caught.value)


def test_data_without_image_shape(kd: Command) -> None:
    arguments = ["layers", "-c", "digits/student", "--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"]
    with pytest.raises(SystemExit, match=r"does not have an image_shape; add --image_shape '\[3, 32, 32\]'"):
        kd(*arguments)
    assert "fc" in kd(*arguments, "--image_shape=[1,8,8]")

"""Mistakes on the command line and in YAML files: one sentence, with the nearest name."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., str]
FIT = ["fit", "-c", "digits/student"]


def refusal(kd: Command, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        kd(*arguments)
    message = str(ended.value.code)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data.batchsize", "8"],
            "data.batchsize is not an argument of kd_lightning.DigitsDataModule; the nearest is b",
        ),
        (
            ["--data.root=x"],
            "data.root is not an argument of kd_lightning.DigitsDataModule; it takes batch_size, val_fr",
        ),
        (
            ["--model.student=torchvision/resnet18"],
            "model.student is not an argument of kd_lightning.TeacherModule; the nearest is network.",
        ),
        (["--model.network.num_class=3"], "networks.ResNet; the nearest is num_classes."),
        (
            ["--model.lr", "3"],
            "model.lr is not an argument of kd_lightning.TeacherModule; the nearest is learning_rate.",
        ),
        (["--model.optimizer=AdamW", "--model.optimizer.lrr=3"], "torch.optim.AdamW; the nearest is lr."),
        (["--trainer.max_epochs", "three"], "trainer.max_epochs must be int or null, got 'three'."),
        (["--model.label_smoothing", "lots"], "model.label_smoothing must be float, got 'lots'."),
        (["--trainer.precision=bf16-mixd"], "got 'bf16-mixd'; the nearest is bf16-mixed."),
        (["--trainer.max_epoch", "3"], "There is no option --trainer.max_epoch; the nearest is --trainer.max_epochs."),
        (["--modle.alpha", "3"], "There is no option --modle.alpha; the nearest is --model."),
        (["--teachr", "x"], "There is no option --teachr; the nearest is --teacher."),
        (["more"], "'more' is not used by the command; options begin with --."),
        (
            ["--model.optimizer", "AdmaW"],
            "model.optimizer: 'AdmaW' is not a class; give its import path, as in torch.optim.Ad",
        ),
        (
            ["--trainer.callbacks+=FreezeLayer"],
            "'FreezeLayer' is not a class; give its import path, as in kd_lightning.c",
        ),
        (
            ["--model.network=torchvision.models.resnet19"],
            "torchvision.models has no 'resnet19'; the nearest is resnet18.",
        ),
        (
            ["--model.network=my_net.Net"],
            "model.network: there is no module 'my_net'; the nearest is my_nets; install it",
        ),
        (
            ["--model.network=my_nets.build", "--model.network.width=3"],
            "model.network.width is not an argument of my_nets.build; set model.network.dict_kwargs.width if it is for "
            "what my_nets.build calls.",
        ),
        (["--model.network=my_nets.build", "--model.network.nam=a"], "of my_nets.build; the nearest is name."),
        (
            ["--data.augmentation.erazing=0.1"],
            "is not an argument of kd_lightning.DigitsDataModule; the nearest is augm",
        ),
        (["--data.augmentation.erazing", "0.1"], "data.augmentation.erazing is not an argument of kd_lightning.Digits"),
        (
            ["--data.augmentation=strong"],
            "data.augmentation is a group of settings, got 'strong'; set them one by one, as",
        ),
        (["--model.lr_scheduler=StepLR"], "model.lr_scheduler: the following arguments are required: step_size."),
    ],
)
def test_a_misspelt_option_names_the_nearest(
    kd: Command, options: list[str], message: str, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: sys.modules.pop("my_nets", None))  # other tests have modules of this name
    Path("my_nets.py").write_text(
        "from torch import nn\ndef build(name: str = 'Net', **more) -> nn.Module:\n    return globals()[name](**more)"
    )
    assert message in refusal(kd, *FIT, *options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_epoch: 3}", "There is no option 'trainer.max_epoch'; the nearest is trainer.max_epochs."),
        ("modell: {class_path: x}", "There is no option 'modell.class_path'; the nearest to modell is model."),
        (
            "model: {init_args: {learning_rat: 3}}",
            "model.learning_rat is not an argument of kd_lightning.TeacherModule",
        ),
        (
            "model: {class_path: kd_lightning.TeacherModul}",
            "model: kd_lightning has no 'TeacherModul'; the nearest is T",
        ),
        (
            "trainer: {callbacks: [{class_path: kd_lightning.callbacks.FreezeLayers, init_args: {until: 3}}]}",
            "trainer.callbacks.until is not an argument of kd_lightning.callbacks.FreezeLayers; the nearest is until",
        ),
        (
            "model: {init_args: {losses: {hard: {class_path: HardTargetLos}}}}",
            "model.losses.hard: there is no such class",
        ),
        ("trainer: [", "'mine.yaml' is not a YAML file ("),
        ("- trainer", "'mine.yaml' is not a configuration; it needs sections such as model"),
    ],
)
def test_a_misspelt_key_of_a_file_names_the_nearest(kd: Command, text: str, message: str) -> None:
    Path("mine.yaml").write_text(text)
    assert message in refusal(kd, *FIT, "-c", "mine.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "kd-lightning: there is no command 'fti'; the nearest is fit"),
        (["fit", "-c"], "-c needs a name"),
        (["export"], "kd-lightning export: the following arguments are required: checkpoint."),
        (["export", "x", "--int9"], "kd-lightning export: There is no option --int9; the nearest is --int8."),
        (
            ["export", "x", "--format=onyx"],
            "format must be 'onnx' or 'torch' or 'safetensors', got 'onyx'; the nearest is o",
        ),
        (["report", "x", "--outpt", "a"], "There is no option --outpt; the nearest is --output."),
        (
            ["layers", *FIT[1:], "--image_shap=[1, 8, 8]"],
            "There is no option --image_shap; the nearest is --image_shape.",
        ),
    ],
)
def test_every_command_names_the_nearest(kd: Command, arguments: list[str], message: str) -> None:
    assert message in refusal(kd, *arguments)


@pytest.mark.parametrize(
    "arguments", [["fit", "--help-all"], ["fit", "--model.help", "kd_lightning.TeacherModule"], ["export", "--help"]]
)
def test_help_is_printed(kd: Command, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kd(*arguments)
    assert not ended.value.code
    assert "usage" in capsys.readouterr().out.lower()

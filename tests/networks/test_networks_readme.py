"""The README of the networks: its table is what the networks are, and its example runs."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import published_forward as published
import pytest
import torch
import yaml
from torch import nn

from kd_lightning import networks
from kd_lightning.features import layer_shapes
from kd_lightning.networks import data_config

README = (Path(networks.__file__).parent / "README.md").read_text()
ROWS = {
    row[0]: row
    for row in (
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("| `")
    )
}
TABLE = {name: row for name, row in ROWS.items() if len(row) == 9}


def test_every_network_has_a_row() -> None:
    builders = {name for name in networks.__all__ if re.match(r"resnet\d|wrn_|vgg\d|mobilenet_|shufflenet_", name)}
    assert set(TABLE) == builders


@pytest.mark.parametrize("name", TABLE)
def test_a_row_is_what_the_network_is(name: str) -> None:
    _, parameters, *layers, pooled, embedding = TABLE[name]
    network: nn.Module = getattr(networks, name)(num_classes=100).eval()
    assert f"{sum(weight.numel() for weight in network.parameters()):,}" == parameters
    shapes = layer_shapes(network, torch.rand(1, 3, 32, 32))
    stages = [shapes.get(f"layer{i + 1}") for i in range(5)]
    assert layers == ["" if shape is None else f"{shape[1]}x{shape[2]}" for shape in stages]
    assert shapes["avgpool"] == (1, int(embedding), 1, 1)
    outputs: dict[str, torch.Tensor] = {}
    for layer in (pooled, "fc"):
        network.get_submodule(layer).register_forward_hook(lambda *call, layer=layer: outputs.update({layer: call[2]}))
    network(torch.rand(1, 3, 32, 32))
    read = network.get_submodule("fc")(outputs[pooled].mean((2, 3)))
    torch.testing.assert_close(read, outputs["fc"], rtol=1e-4, atol=1e-4 * outputs["fc"].abs().max().item())


def test_the_example_reads_a_published_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = published.Weights()
    published.vgg(weights, torch.randn(1, 3, 32, 32), convolutions=2)
    Path("vgg13_vanilla").mkdir()
    torch.save({"model": dict(weights)}, "vgg13_vanilla/ckpt_epoch_240.pth")
    namespace: dict[str, nn.Module] = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0], namespace)
    assert namespace["teacher"].get_parameter("layer5.3.bias").equal(weights["block4.3.bias"])
    assert data_config(namespace["teacher"]).mean == (0.5071, 0.4867, 0.4408)


def test_the_command_builds_the_pair(kd: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.split(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[0].replace("\\\n", ""))
    with pytest.raises(SystemExit):
        kd(*command[1:], "--print_config")
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    hint = model["losses"]["hint"]["init_args"]
    pair = [
        (network["class_path"].rpartition(".")[2], hint[f"{role}_layers"][0])
        for role, network in (("student", model["student"]), ("teacher", model["teacher"]["init_args"]["network"]))
    ]
    assert [TABLE[name][int(layer.removeprefix("layer")) + 1] for name, layer in pair] == ["256x8", "512x16"]
    assert model["teacher"]["init_args"]["path"] == "ResNet50_vanilla/ckpt_epoch_240.pth"

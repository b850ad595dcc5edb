"""`kd-lightning layers`."""

from functools import partial

import torch

from kd_lightning.data.protocol import FollowsNetworks
from kd_lightning.errors import UserError
from kd_lightning.features import layer_shapes
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.networks.dry_run import try_forward


def print_layers(module: ClassificationModule, data: object, image_shape: list[int] | None) -> None:
    """Print the layers of a module's networks, under the names that losses take, with their shapes for one image.

    Args:
        module: Module whose networks are listed.
        data: Data module, from which the shape of an image is taken if it is not given.
        image_shape: Channels, height and width.

    Raises:
        ValueError: If the shape is neither given nor known by the data.
    """
    if image_shape is None and isinstance(data, FollowsNetworks):
        data.follow_networks(module.known_inputs())
    shape = image_shape or getattr(data, "image_shape", None)
    if shape is None:
        raise UserError("The data module does not have an image_shape; add --image_shape '[3, 32, 32]'.")
    for role in ("network", "teacher"):
        network = getattr(module, role, None)
        if network is not None:
            images = torch.zeros(2, *shape)
            shapes = try_forward(network, partial(layer_shapes, network, images), f"The {role}", images)
            width = max(map(len, shapes))
            print(f"{module.network_argument if role == 'network' else role}: {type(network).__name__}")
            print("\n".join(f"  {name:<{width}}  {tuple(size[1:])}" for name, size in shapes.items()))

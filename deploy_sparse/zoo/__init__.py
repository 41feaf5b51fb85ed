"""Networks by name. A ticket stores the name and the arguments; :func:`build` constructs the network again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, nearest
from .resnet import ResNet
from .vgg import VGG


@dataclass(frozen=True)
class Entry:
    """A zoo network: its class, default arguments, and the shape of one input sample ``(C, H, W)``."""

    factory: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)


_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)

ZOO: dict[str, Entry] = {
    "resnet18": Entry(ResNet, (3, 32, 32), {"blocks": (2, 2, 2, 2), "widths": (64, 128, 256, 512)}),
    "resnet_digits": Entry(ResNet, (1, 8, 8), {"blocks": (1, 1, 1), "widths": (64, 128, 256), "in_channels": 1}),
    "vgg16_bn": Entry(VGG, (3, 32, 32), {"layout": _VGG16}),
    "vgg_digits": Entry(
        VGG,
        (1, 8, 8),
        {"layout": (64, 64, "M", 128, 128, "M"), "in_channels": 1, "hidden": 128, "flatten": 2 * 2},
    ),
}


def entry(name: str) -> Entry:
    """The zoo entry called ``name``.

    Raises:
        ConfigError: no such network; the message lists the names.
    """
    if name not in ZOO:
        raise ConfigError(
            f"unknown network {name!r}",
            expected=f"one of {', '.join(ZOO)}",
            fix=f"{nearest(name, list(ZOO))}for a network of your own pass factory=… from Python",
        )
    return ZOO[name]


def check(name: str, arguments: Mapping[str, Any], image_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Refuse a network that cannot be built or does not classify such images; allocates no weights.

    Args:
        arguments: as for :func:`build`.
        image_shape: one image ``(C, H, W)``.
        classes: number of classes of the data.

    Returns:
        the network on the meta device: its structure without its weights.

    Raises:
        ConfigError: an unknown network, arguments it does not take, or images it does not take.
    """
    with torch.device("meta"):
        network = build(name, **arguments).eval()
        try:
            found = f"outputs of shape {list(network(torch.zeros(2, *image_shape)).shape)}"
        except RuntimeError as problem:
            found = f"an error ({str(problem).splitlines()[0]})"
    if found != f"outputs of shape {[2, classes]}":
        raise ConfigError(
            f"network {name!r} makes {found} of two images of shape {list(image_shape)}",
            expected=f"outputs of shape {[2, classes]}",
            fix="choose a network for this data, or set model.arguments such as in_channels and classes",
        )
    return network


def build(name: str, **arguments: Any) -> nn.Module:
    """Construct a zoo network with freshly initialised weights; ``arguments`` override the entry's own.

    Raises:
        ConfigError: no such network, or an argument it does not take.
    """
    found = entry(name)
    try:
        return found.factory(**{**found.arguments, **arguments})
    except (TypeError, ValueError, IndexError, RuntimeError) as problem:
        raise ConfigError(
            f"{name!r} cannot be built with {arguments} ({problem})",
            expected=f"arguments like {dict(found.arguments)}",
            fix="mend the [model] arguments",
        ) from None

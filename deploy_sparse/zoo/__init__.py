"""Networks by name. A ticket stores the name and the arguments; :func:`build` constructs the network again.

Every network takes ``classes``. ``torchvision/<name>`` is torchvision's ImageNet classifier of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, nearest
from . import imagenet
from .mobilenet import MobileNet
from .resnet import ResNet
from .vgg import VGG


@dataclass(frozen=True)
class Entry:
    """A zoo network: its class, default arguments, and the shape of one input sample ``(C, H, W)``."""

    factory: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)


_SMALL = (3, 32, 32)
_VGG16 = (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3)
_VGG19 = (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4)
_MOBILENET = {
    "widths": (32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024),
    "strides": (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1),
}


def _resnet_6n_plus_2(n: int) -> Entry:
    """The ResNets that He et al. 2016 made for CIFAR-10 (section 4.2): ``6 n + 2`` layers, option A shortcuts."""
    return Entry(ResNet, _SMALL, {"blocks": (n, n, n), "widths": (16, 32, 64), "shortcut": "pad"})


ZOO: dict[str, Entry] = {
    "resnet18": Entry(ResNet, _SMALL, {"blocks": (2, 2, 2, 2), "widths": (64, 128, 256, 512)}),
    "resnet50": Entry(ResNet, _SMALL, {"blocks": (3, 4, 6, 3), "widths": (64, 128, 256, 512), "block": "bottleneck"}),
    "resnet20": _resnet_6n_plus_2(3),
    "resnet32": _resnet_6n_plus_2(5),
    "resnet56": _resnet_6n_plus_2(9),
    "wrn32_2": Entry(ResNet, _SMALL, {"blocks": (5, 5, 5), "widths": (32, 64, 128)}),
    "vgg16_bn": Entry(VGG, _SMALL, {"layout": _VGG16}),
    "vgg19_bn": Entry(VGG, _SMALL, {"layout": _VGG19}),
    "mobilenet_v1": Entry(MobileNet, _SMALL, _MOBILENET),
    "resnet_synthetic": Entry(ResNet, _SMALL, {"blocks": (1, 1, 1), "widths": (16, 32, 64), "stem_stride": 2}),
    "resnet_digits": Entry(ResNet, (1, 8, 8), {"blocks": (1, 1, 1), "widths": (64, 128, 256), "in_channels": 1}),
    "vgg_digits": Entry(
        VGG,
        (1, 8, 8),
        {"layout": (64, 64, "M", 128, 128, "M"), "in_channels": 1, "hidden": 128, "flatten": 2 * 2},
    ),
}


def known(name: str) -> bool:
    """Whether :func:`build` can construct a network called ``name``."""
    return name in ZOO or (name.startswith(imagenet.PREFIX) and name.removeprefix(imagenet.PREFIX) in imagenet.names())


def entry(name: str) -> Entry:
    """The zoo entry called ``name``.

    Raises:
        ConfigError: no such network; the message lists the names.
    """
    if name in ZOO:
        return ZOO[name]
    if known(name):
        own = name.removeprefix(imagenet.PREFIX)
        return Entry(partial(imagenet.construct, own), imagenet.INPUT_SHAPE, imagenet.DEFAULTS.get(own, {}))
    if name.startswith(imagenet.PREFIX):
        raise ConfigError(
            f"unknown network {name!r}",
            expected="a classifier of torchvision.models, such as torchvision/resnet50",
            fix=f"{nearest(name, [imagenet.PREFIX + own for own in imagenet.names()])}see "
            "torchvision.models.list_models(module=torchvision.models)",
        )
    raise ConfigError(
        f"unknown network {name!r}",
        expected=f"one of {', '.join(ZOO)}, or torchvision/<name> for a classifier of torchvision.models",
        fix=f"{nearest(name, list(ZOO))}for a network of your own pass factory=… from Python",
    )


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
        shape: list[int] = []
        try:
            shape = list(network(torch.zeros(2, *image_shape)).shape)
            found = f"outputs of shape {shape}"
        except (RuntimeError, AssertionError, ValueError, IndexError) as problem:  # what networks raise at wrong shapes
            found = f"an error ({(str(problem) or type(problem).__name__).splitlines()[0]})"
    if len(shape) == 2 and shape[0] == 2 and shape[1] != classes:
        raise ConfigError(
            f"network {name!r} makes {shape[1]} classes, the data has {classes}",
            expected="as many classes as the data has",
            fix=f"set them: --model.arguments '{{classes={classes}}}'",
        )
    if shape != [2, classes]:
        raise ConfigError(
            f"network {name!r} makes {found} of two images of shape {list(image_shape)}",
            expected=f"outputs of shape {[2, classes]}",
            fix="choose a network for this data, or set model.arguments such as in_channels and classes",
        )
    return network


def build(name: str, **arguments: Any) -> nn.Module:
    """Construct a zoo network with freshly initialised weights; ``arguments`` override the entry's own.

    ``classes`` is the number of classes for every network. Weights are never downloaded.

    Raises:
        ConfigError: no such network, or an argument it does not take.
    """
    found = entry(name)
    try:
        return found.factory(**{**found.arguments, **arguments})
    except (TypeError, ValueError, IndexError, RuntimeError, AssertionError) as problem:
        raise ConfigError(
            f"{name!r} cannot be built with {arguments} ({problem})",
            expected=f"arguments like {dict(found.arguments) | {'classes': 10}}",
            fix="mend the [model] arguments",
        ) from None

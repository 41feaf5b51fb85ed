"""torchvision's ImageNet classifiers, freshly initialised; only this module imports torchvision's models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

PREFIX = "torchvision/"
INPUT_SHAPE = (3, 224, 224)

_ONE_OUTPUT: Mapping[str, Any] = MappingProxyType({"aux_logits": False, "init_weights": True})
"""Without auxiliary classifiers, so that these return logits in training as well; torchvision's own initialisation."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"googlenet": _ONE_OUTPUT, "inception_v3": _ONE_OUTPUT}
"""Arguments by name where torchvision's own defaults do not fit."""


@cache
def names() -> tuple[str, ...]:
    """Every classifier of ``torchvision.models``, without the prefix."""
    from torchvision import models

    return tuple(models.list_models(module=models))


def construct(name: str, **arguments: Any) -> nn.Module:
    """A classifier of ``torchvision.models`` with new weights; nothing is ever downloaded.

    Args:
        name: one of :func:`names`.
        arguments: torchvision's own; the number of classes may also be called ``classes``, as in the rest of the zoo.

    Raises:
        ValueError: pretrained weights were asked for, or two numbers of classes.
        TypeError: an argument that the network does not take.
    """
    from torchvision.models import get_model

    if arguments.pop("weights", None) is not None:
        raise ValueError("weights are not downloaded")
    if "classes" in arguments:
        if "num_classes" in arguments:
            raise ValueError("classes and num_classes are the same argument")
        arguments["num_classes"] = arguments.pop("classes")
    try:
        network: nn.Module = get_model(name, weights=None, **arguments)
    except NotImplementedError:  # RegNet reads its sizes back from tensors, which have no content on the meta device
        wanted = torch.get_default_device()
        with torch.device("cpu"):
            network = get_model(name, weights=None, **arguments).to(wanted)
    return network

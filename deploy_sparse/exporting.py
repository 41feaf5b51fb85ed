"""What every exporter of networks needs: evaluation mode for a while, and PyTorch's exporters kept quiet."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context; every part has its own mode back afterwards."""
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient within it: FlopCounterMode fails on a submodule that gets a view of one."""
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's prints, logs and warnings off the screen; what matters comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(sys.maxsize)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)

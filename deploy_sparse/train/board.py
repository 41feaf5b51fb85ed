"""The metrics of a training for TensorBoard, which is optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Board:
    """Writes numbers by epoch into ``folder``, from the first row on; ``on=False`` writes nothing.

    Rows of epochs that an earlier, interrupted attempt wrote already replace them.
    """

    def __init__(self, folder: Path, *, on: bool) -> None:
        self.folder, self.on = folder, on
        self._writer: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one row of metrics; ``row["epoch"]`` is its place."""
        if not self.on:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=row["epoch"])
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, row["epoch"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

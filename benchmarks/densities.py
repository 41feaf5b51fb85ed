"""Remaining weights of IMP, refill and refill+ on the paper's networks, beside the values the paper prints.

Masks prune the networks' initial weights by global magnitude, all but the head, to 0.8^r of them in r rounds: how many
weights remain after refill depends on the rounding of each layer's channels, hardly on which weights survive.

    python benchmarks/densities.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from deploy_sparse import zoo
from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.sparsify.imp import dense_masks, prune_lowest
from deploy_sparse.sparsify.refill import refill
from deploy_sparse.structure import density

FOLDER = Path(__file__).resolve().parent / "records" / "any" / "densities"
EXTRA = 0.2
# Chen et al. 2022, Tables A3 and A5 to A7: remaining weights of refill in percent, by network and round
PUBLISHED = {
    "vgg16_bn": {1: 80.17, 2: 64.06, 3: 51.31, 4: 41.08, 5: 32.85, 6: 26.33, 7: 21.03, 8: 16.94, 9: 13.42},
    "wrn32_2": {1: 80.00, 2: 64.06, 3: 51.51, 4: 41.51, 6: 26.53, 7: 21.11, 8: 17.11, 9: 13.67},
    "resnet50": {1: 80.30, 2: 64.16, 3: 51.42, 4: 41.08, 5: 32.85},
    "resnet18": {1: 80.29, 2: 64.49, 3: 51.43, 4: 41.24, 5: 32.97},
}


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One row a round."""
    torch.manual_seed(0)
    model = zoo.build(name)
    weights, masks, rows = model.state_dict(), dense_masks(model), []
    for number in range(1, rounds + 1):
        masks = prune_lowest(weights, masks, 0.2)
        filled = {extra: density(refill(masks, weights, (), extra=extra, silent=False)) for extra in (0.0, EXTRA)}
        rows.append(
            {
                "network": name,
                "round": number,
                "imp": density(masks),
                "refill": filled[0.0],
                "refill_plus": filled[EXTRA],
                "published_refill_percent": PUBLISHED[name].get(number),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as people read them."""
    cells = [
        (
            row["network"],
            row["round"],
            *(f"{row[key]:.2%}" for key in ("imp", "refill", "refill_plus")),
            "–" if row["published_refill_percent"] is None else f"{row['published_refill_percent']:.2f}%",
        )
        for row in rows
    ]
    columns = ("network", "round", "IMP", "refill", f"refill+ ({EXTRA:g})", "refill in the paper")
    return Table("Remaining weights", columns, tuple(cells), "Shares of the prunable weights in kept channels.")


def text(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    return markdown(table([row for row in rows if row.get("kind") != "conditions"]))


def main() -> None:
    """Command line."""
    rows = [row for name, published in PUBLISHED.items() for row in measure(name, max(published))]
    lines = [json.dumps({"kind": "conditions", "environment": environment()}), *map(json.dumps, rows)]
    write_bytes(FOLDER / "results.jsonl", ("\n".join(lines) + "\n").encode())
    write_bytes(FOLDER / "results.md", text(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()

"""Which rule an operation without weights follows.

A rule first ties or fixes the channels the operation would not survive losing, then applies the operation to atoms and
constants alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ._axes import Ledger
from ._nodes import Node
from ._part_rules import channel_shuffle, chunk, glu, join, pixel_shuffle, shift
from ._pointwise import POINTWISE_TOO, pointwise
from ._reduction_rules import ADD_UP, POOL_AVERAGE, along_axis, pool, reduce
from ._shape_rules import RESHAPE, Result, copied, filled, identity, invented, look_up, pad, pick, same_operation
from ._words import names
from .trace import arguments, operation

Rule = Callable[[Ledger, Node], Result]

IDENTITY = names("clone contiguous detach alias lift_fresh_copy lift_fresh to _to_copy type_as")
DROPOUT = names("dropout feature_dropout alpha_dropout feature_alpha_dropout")
PICK = names("slice select split split_with_sizes unbind narrow tensor_split")
MOVE = names(
    "permute transpose t unsqueeze squeeze movedim swapaxes repeat repeat_interleave tile flip pixel_unshuffle"
)
LOOK_UP = frozenset({"index", "index_select"})
JOIN = frozenset({"cat", "concat", "stack"})
REDUCE = ADD_UP | names("mean amax amin var std max min logsumexp prod median any all")
ALONG = names("softmax _softmax log_softmax cumsum cumprod sort")
POOLS = frozenset(f"{kind}pool{n}d" for kind in ("max_", "adaptive_avg_", "adaptive_max_", "lp_") for n in (1, 2, 3))
NUMBERS = names("zeros_like ones_like full_like new_zeros new_ones new_full zeros ones full zero zero_ fill fill_")
INVENTED = names("rand randn rand_like randn_like empty empty_like new_empty arange linspace eye")


def rule_for(node: Node) -> Callable[[Ledger, Node], Result] | None:
    """The rule of a weightless operation, or None for an unknown one."""
    name, target = operation(node)
    if name in IDENTITY:
        return identity
    if name in DROPOUT:
        return None if arguments(node)["train"] else identity
    if name in RESHAPE and "dtype" not in str(target):
        return same_operation
    if name in ("max", "min") and getattr(target, "_overloadname", "") == "other":
        return pointwise
    known = _TABLE.get(name)
    if known is not None:
        return known
    if name in POOLS or name in POOL_AVERAGE or name.startswith(("upsample_", "_upsample_", "max_pool")):
        return pool
    tags = getattr(target, "tags", ())
    pointwise_tag = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return pointwise if pointwise_tag or name in POINTWISE_TOO else None


_TABLE: Mapping[str, Rule] = {
    "pad": pad,
    "chunk": chunk,
    "pixel_shuffle": pixel_shuffle,
    "channel_shuffle": channel_shuffle,
    "glu": glu,
    "copy": copied,
    "copy_": copied,
    **dict.fromkeys(PICK, pick),
    **dict.fromkeys(("roll", "rot90", "unfold"), shift),
    **dict.fromkeys(MOVE, same_operation),
    **dict.fromkeys(LOOK_UP, look_up),
    **dict.fromkeys(JOIN, join),
    **dict.fromkeys(REDUCE, reduce),
    **dict.fromkeys(ALONG, along_axis),
    **dict.fromkeys(NUMBERS, filled),
    **dict.fromkeys(INVENTED, invented),
}

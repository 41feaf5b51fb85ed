"""Rules for products of two activations: matmul, einsum, attention. What is summed over must be zero to go."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ._axes import Ledger, Mixing
from ._meet import meet
from ._nodes import Node
from ._values import UNTRACKED, Value, compressed, even, lean, untracked, varying
from .trace import arguments, operation, place


def rule_for(node: Node) -> Callable[[Ledger, Node], Value] | None:
    """The rule of a product of activations, or None when this is none."""
    return {
        "matmul": matmul,
        "bmm": matmul,
        "mm": matmul,
        "baddbmm": baddbmm,
        "einsum": einsum,
        "scaled_dot_product_attention": attention,
    }.get(operation(node)[0])


def matmul(ledger: Ledger, node: Node) -> Value:
    """``[..., n, k] @ [..., k, m]``, batch axes broadcast; vectors as in :func:`torch.matmul`."""
    left, right = (ledger.value(n) for n in node.args[:2])
    return _matmul(ledger, node, left, right)


def baddbmm(ledger: Ledger, node: Node) -> Value:
    """``input · beta + left @ right``."""
    added, left, right = (ledger.value(n) for n in node.args[:3])
    product = _matmul(ledger, node, left, right)
    meet(ledger, node, product, added, node.args[0])
    return Value(product.atoms, torch.full_like(product.constant, torch.nan), why=product.why)


def einsum(ledger: Ledger, node: Node) -> Value:
    """Products of two tensors in Einstein's notation; anything else is not followed."""
    given = arguments(node)
    equation = str(given["equation"]).replace(" ", "")
    operands = [ledger.value(n) for n in given["tensors"]]
    shape = node.meta["val"].shape
    inputs, arrow, output = equation.partition("->")
    names = inputs.split(",")
    if len(operands) == 2 and arrow:
        names, output = _without_ellipsis(names, output, [len(v.shape) for v in operands])
        if all(len(set(n)) == len(n) for n in names):
            product = Product(node, output, shape, only_into_softmax(ledger, node))
            return contract(ledger, (operands[0], names[0]), (operands[1], names[1]), product)
    for value in operands:
        ledger.pin(value, f"einsum {equation!r} at {place(node)}")
    return untracked(shape, f"einsum {equation!r} at {place(node)}")


def attention(ledger: Ledger, node: Node) -> Value:
    """``softmax(q kᵀ · scale + mask) v`` with ``q [..., L, E]``, ``k [..., S, E]``, ``v [..., S, M]``."""
    given = arguments(node)
    query, key, value = (ledger.value(given[name]) for name in ("query", "key", "value"))
    shape = node.meta["val"].shape
    if given["enable_gqa"] and query.shape[-3] != key.shape[-3]:
        key, value = (_shared_out(v, query.shape[-3]) for v in (key, value))
    if len({tuple(v.shape[:-2]) for v in (query, key, value)}) > 1:
        for v in (query, key, value):
            ledger.pin(v, why := f"heads are shared out by {place(node)}")
        return untracked(shape, why)
    batch = string.ascii_lowercase[: len(shape) - 2]
    if given["scale"] is None and len(query.shape) - 1 in varying(query.atoms):
        ledger.divided.append(node)
    logits_shape = (*query.shape[:-1], key.shape[-2])
    products = Product(node, batch + "LS", torch.Size(logits_shape), softmax=True)
    logits = contract(ledger, (query, batch + "LE"), (key, batch + "SE"), products)
    if given["attn_mask"] is not None:
        meet(ledger, node, logits, ledger.value(given["attn_mask"]), given["attn_mask"])
    # A row whose mask hides everything gives zeros, not an average.
    weights = replace(logits, sums_to_one=given["attn_mask"] is None or _hides_no_row(ledger, given["attn_mask"]))
    return contract(ledger, (weights, batch + "LS"), (value, batch + "SM"), Product(node, batch + "LM", shape))


@dataclass(frozen=True)
class Product:
    """What a product of two tensors gives.

    Attributes:
        node: the operation.
        out: a letter for each axis of the result.
        shape: of the result.
        softmax: the result goes nowhere but into a softmax over its last axis, which takes no notice of what it adds
            along the whole axis.
    """

    node: Node
    out: str
    shape: torch.Size
    softmax: bool = False


def _shared_out(value: Value, heads: int) -> Value:
    """Each head of ``value``, ``[.., heads, S, E]``, repeated for the queries that share it."""
    times = heads // value.shape[-3]
    return replace(
        value,
        atoms=compressed(value.atoms.repeat_interleave(times, dim=-3)),
        constant=compressed(value.constant.repeat_interleave(times, dim=-3)),
    )


def _hides_no_row(ledger: Ledger, mask: Node) -> bool:
    """Whether the mask is known, and leaves something to see in every row."""
    known = lean(ledger.value(mask).constant)
    if bool(known.isnan().any()):
        return False
    seen = known != 0 if mask.meta["val"].dtype == torch.bool else known > -torch.inf
    return bool(seen.any(dim=-1).all())


def contract(ledger: Ledger, left: tuple[Value, str], right: tuple[Value, str], product: Product) -> Value:
    """The sum over all axes of two factors that the result does not have; each letter names one axis."""
    out, shape, where = product.out, product.shape, place(product.node)
    a, la, b, lb = _broadcast_dropped(*left, *right)
    va, vb = ({names[d] for d in varying(value.atoms)} for value, names in ((a, la), (b, lb)))
    for value, names, mine, theirs, other in ((a, la, va, vb, lb), (b, lb, vb, va, la)):
        strange = {n for n in mine - theirs if n in other or n not in out}  # the other factor has them, but no channels
        if strange:
            ledger.fix(value, {names.index(n) for n in strange}, f"channels meet values without channels at {where}")
    summed = {n for n in va | vb if n not in out}
    if not va and not vb:
        return untracked(shape, a.why or b.why)
    if not summed and (va <= vb or vb <= va):
        return _carried(ledger, *(((a, la), (b, lb)) if vb <= va else ((b, lb), (a, la))), product)
    # The tracked axes left over get channels of their own, tied to those of both factors.
    kept = [n for n in out if n in (va & vb if va and vb else va | vb)]
    for value, names, mine in ((a, la, va), (b, lb, vb)):
        extra = {n for n in mine if n in out and n not in kept}
        if extra:
            ledger.fix(value, {names.index(n) for n in extra}, f"channels of two tensors are multiplied at {where}")
    if va == vb:
        common = sorted(va)
        why = f"channels meet {a.why or b.why} at {where}"
        ledger.atoms.unify(_arranged(a.atoms, la, common), _arranged(b.atoms, lb, common), why)
    sizes = {n: s for value, names in ((a, la), (b, lb)) for n, s in zip(names, value.shape, strict=True)}
    letters = sorted(set(la) | set(lb))
    nothing = _zero(a, la, letters) | _zero(b, lb, letters)
    for value, names, other in ((a, la, lb), (b, lb, la)):
        if (
            product.softmax and out[-1] in names and out[-1] not in other
        ):  # as keys that do not change from place to place
            nothing = nothing | _settled(value, names, out[-1], letters)
    count = int(torch.Size([sizes[n] for n in kept]).numel())
    labels = (ledger.atoms.fresh(count) if kept else torch.tensor([UNTRACKED])).reshape([sizes[n] for n in kept])
    for value, names, mine in ((a, la, va), (b, lb, vb)):
        if not mine:
            continue
        order = kept + sorted(mine - set(kept))
        source = _arranged(value.atoms, names, order)
        target = labels.reshape(*labels.shape, *[1] * (len(order) - len(kept)))
        ledger.mixings.append(Mixing(source, target, _reduced(nothing, letters, order), where))
        if kept and len(order) > len(kept):
            ledger.link([source, target], list(range(len(kept))))
        elif kept:
            ledger.atoms.unify(source, target, where)
    if not kept:
        return untracked(shape, f"channels are summed by {where}")
    return Value(_spread(labels, kept, out, shape), torch.full((), torch.nan, dtype=torch.float64).expand(shape))


def only_into_softmax(ledger: Ledger, node: Node) -> bool:
    """Whether all that becomes of the result is a softmax over its last axis, up to shifts and factors along it."""
    width = node.meta["val"].shape[-1]
    waiting = [node]
    while waiting:
        source = waiting.pop()
        if not ledger.uses(source):
            return False
        for user in ledger.users[source]:
            name, _ = operation(user)
            if name in ("softmax", "_softmax"):
                if arguments(user)["dim"] % user.meta["val"].dim() != user.meta["val"].dim() - 1:
                    return False
            elif name in _SHIFTS or (name in _FACTORS and _even_factor(user, source)):
                if user.meta["val"].shape[-1:] != (width,):
                    return False
                waiting.append(user)
            else:
                return False
    return True


_SHIFTS = frozenset(
    {"add", "sub", "dropout", "clone", "contiguous", "alias", "view", "reshape", "_to_copy", "to", "unsqueeze"}
)
_FACTORS = frozenset({"mul", "multiply", "div", "true_divide"})


def _even_factor(node: Node, source: Node) -> bool:
    others = [x for x in node.args if isinstance(x, Node) and x is not source]
    return all(x.meta["val"].dim() == 0 or x.meta["val"].shape[-1] == 1 for x in others)


def _settled(value: Value, names: str, letter: str, order: Sequence[str]) -> torch.Tensor:
    """Where the factor holds one known number all along the axis ``letter``; axes as in ``order``."""
    even_there = even(value.constant, [names.index(letter)])
    return _zero(Value(value.atoms, torch.where(even_there.isnan(), torch.nan, 0.0)), names, order)


def _carried(ledger: Ledger, main: tuple[Value, str], other: tuple[Value, str], product: Product) -> Value:
    """The result has the channels of ``main``; those of ``other`` lie along some of the same axes, or nowhere."""
    (value, names), (factor, theirs) = main, other
    out, shape, where = product.out, product.shape, place(product.node)
    shared = [n for n in out if n in {theirs[d] for d in varying(factor.atoms)}]
    order = shared + [n for n in out if n in {names[d] for d in varying(value.atoms)} and n not in shared]
    atoms = _arranged(value.atoms, names, order)
    zero = _reduced(_zero(value, names, list(names)), list(names), order)
    if shared:
        met = _arranged(factor.atoms, theirs, shared)
        if len(shared) == len(order):
            ledger.atoms.unify(atoms, met, f"channels meet {value.why or factor.why} at {where}")
        else:
            spread = met.reshape(*met.shape, *[1] * (len(order) - len(shared)))
            ledger.link([atoms, spread], list(range(len(shared))))
            known = zero if not factor.sums_to_one else _even_along(value, names, order)[0]
            ledger.mixings.append(Mixing(spread.expand(atoms.shape), atoms, known, where))
    constant = torch.where(zero, 0.0, torch.nan)
    if factor.sums_to_one and theirs[-1] not in out:  # an average: a number that is the same everywhere stays
        known, number = _even_along(value, names, order)
        constant = torch.where(known, number, constant)
    return Value(_spread(atoms, order, out, shape), _spread(constant, order, out, shape), why=value.why)


def _even_along(value: Value, names: str, order: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the factor holds one known number along all axes that ``order`` does not name, and that number."""
    number = even(value.constant, [d for d, n in enumerate(names) if n not in order])
    laid = _arranged(number, names, order)
    return ~laid.isnan(), laid


def _matmul(ledger: Ledger, node: Node, left: Value, right: Value) -> Value:
    shape = node.meta["val"].shape
    la = "nk" if len(left.shape) > 1 else "k"
    lb = "km" if len(right.shape) > 1 else "k"
    batch = string.ascii_uppercase
    depth = max(len(left.shape) - len(la), len(right.shape) - len(lb), 0)
    full = batch[:depth]
    la = full[depth - (len(left.shape) - len(la)) :] + la
    lb = full[depth - (len(right.shape) - len(lb)) :] + lb
    out = full + ("n" if "n" in la else "") + ("m" if "m" in lb else "")
    return contract(ledger, (left, la), (right, lb), Product(node, out, shape, only_into_softmax(ledger, node)))


def _broadcast_dropped(a: Value, la: str, b: Value, lb: str) -> tuple[Value, str, Value, str]:
    """An axis of size 1 that the other factor has at full size is no axis of this one."""
    sa, sb = dict(zip(la, a.shape, strict=True)), dict(zip(lb, b.shape, strict=True))

    def reduced(value: Value, names: str, mine: dict[str, int], theirs: dict[str, int]) -> tuple[Value, str]:
        gone = [names.index(n) for n in names if mine[n] == 1 and theirs.get(n, 1) > 1]
        atoms, constant = value.atoms, value.constant
        for d in reversed(gone):
            atoms, constant = atoms.select(d, 0), constant.select(d, 0)
        left = "".join(n for d, n in enumerate(names) if d not in gone)
        return replace(value, atoms=atoms, constant=constant), left

    return *reduced(a, la, sa, sb), *reduced(b, lb, sb, sa)


def _arranged(tensor: torch.Tensor, names: str, order: Sequence[str]) -> torch.Tensor:
    """``tensor`` with exactly the axes ``order``; it must not change along the others."""
    small = lean(tensor)
    for d in reversed(range(len(names))):
        if names[d] not in order:
            small = small.select(d, 0)
    left = [n for n in names if n in order]
    full = small.permute([left.index(n) for n in order if n in left])
    for d, n in enumerate(order):
        if n not in left:
            full = full.unsqueeze(d)
    sizes = [tensor.shape[names.index(n)] if n in names else 1 for n in order]
    return full.expand(sizes)


def _zero(value: Value, names: str, order: Sequence[str]) -> torch.Tensor:
    """Where the factor is known to be zero, laid out along ``order`` with size 1 along axes it does not have."""
    zero = lean(value.constant) == 0
    present = [n for n in order if n in names]
    laid = zero.permute([names.index(n) for n in present])
    for d, n in enumerate(order):
        if n not in names:
            laid = laid.unsqueeze(d)
    return laid


def _reduced(flags: torch.Tensor, names: Sequence[str], order: Sequence[str]) -> torch.Tensor:
    """True where ``flags`` is everywhere along the axes that ``order`` does not name; axes as in ``order``."""
    gone = [d for d, n in enumerate(names) if n not in order]
    kept = [n for n in names if n in order]
    small = flags.all(dim=tuple(gone)) if gone else flags
    laid = small.permute([kept.index(n) for n in order if n in kept])
    for d, n in enumerate(order):
        if n not in kept:
            laid = laid.unsqueeze(d)
    return laid


def _spread(tensor: torch.Tensor, names: Sequence[str], out: str, shape: torch.Size) -> torch.Tensor:
    """``tensor`` with axes ``names`` laid into a result with axes ``out``."""
    laid = tensor.permute([list(names).index(n) for n in out if n in names])
    for d, n in enumerate(out):
        if n not in names:
            laid = laid.unsqueeze(d)
    return compressed(laid.expand(shape))


def _without_ellipsis(names: list[str], output: str, ranks: list[int]) -> tuple[list[str], str]:
    spare = [c for c in string.ascii_uppercase if c not in "".join(names)]
    depth = max(
        (rank - len(n.replace("...", "")) for n, rank in zip(names, ranks, strict=True) if "..." in n), default=0
    )
    full = "".join(spare[:depth])
    written = []
    for n, rank in zip(names, ranks, strict=True):
        own = rank - len(n.replace("...", ""))
        written.append(n.replace("...", full[depth - own :] if own else ""))
    return written, output.replace("...", full)

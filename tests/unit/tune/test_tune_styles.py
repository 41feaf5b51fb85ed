"""Each layer is timed in two forms where its blocks have two, and packed in the faster one."""

import pytest
import torch
from planner_samples import WON, X, choose, network, packed, ticket

from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery import compact, load_compact
from deploy_sparse.surgery.packing import Style
from deploy_sparse.tune import formats


def forms_of(found):
    return {pack.module: pack.packing.form for pack in found.plan.shape.packs}


def test_each_layer_takes_the_faster_of_its_forms(monkeypatch, tmp_path):
    ratios = {("3", "free"): 2.0, ("6", "free"): 1.1, ("9", "free"): 1.7}
    found, choice, bench, *_ = choose(
        monkeypatch, lambda form: ratios.get((form.path, form.packing.form), 1.5), lambda *_: WON, crossing=()
    )
    assert forms_of(found) == {"3": "free", "6": "disjoint", "9": "free"}
    assert {time.layer: (time.ratio, "free" in time.form) for time in choice.layers} == {
        "3": (2.0, True),
        "6": (1.5, False),
        "9": (1.7, True),
    }
    assert len(bench.asked) == 3  # once more, as the look-ups are others beside other forms
    assert found.parity.float64.max_rel < 1e-12
    found.save(tmp_path / "c")
    with torch.no_grad():
        torch.testing.assert_close(load_compact(tmp_path / "c", network)(X), found.module(X))


def test_a_form_that_is_hardly_faster_is_not_taken(monkeypatch):
    rival = 1.5 * (1 + formats.MARGIN / 2)
    found, *_ = choose(
        monkeypatch, lambda form: rival if form.packing.form == "free" else 1.5, lambda *_: WON, crossing=()
    )
    assert set(forms_of(found).values()) == {"disjoint"}


@pytest.mark.parametrize("failing", ["free", "disjoint"])
def test_a_form_that_fails_leaves_the_other(monkeypatch, failing):
    found, choice, *_ = choose(
        monkeypatch, lambda form: "no such operator" if form.packing.form == failing else 1.5, lambda *_: WON, crossing=()
    )  # fmt: skip
    (kept,) = {"free", "disjoint"} - {failing}
    assert set(forms_of(found).values()) == {kept}
    suffix = " as free blocks" if failing == "free" else ""
    assert choice.dropped == tuple((f"layer {path} packed{suffix}", "no such operator") for path in ("3", "6", "9"))


def test_styles_can_be_given_by_layer():
    found = compact(
        ticket(()), network, X, format="packed", layers={"3": Style("free", 16), "6": None, "9": Style("equal", 16)}
    )
    assert forms_of(found) == {"3": "free", "6": "disjoint", "9": "equal"}
    assert found.parity.float64.max_rel < 1e-12
    assert packed(found) == {"3", "6", "9"}
    with pytest.raises(SurgeryError, match="blocks of 16×17, 16×16 rows"):
        compact(with_shared_inputs(), network, X, format="packed", layers={"3": Style("disjoint", 16)})


def with_shared_inputs():
    made = ticket(())
    mask = made.masks["3.weight"].clone()
    mask[0::2, 1] = True  # the first block reads a channel of the second
    return type(made)(made.weights, {**made.masks, "3.weight": mask}, made.model, made.provenance)

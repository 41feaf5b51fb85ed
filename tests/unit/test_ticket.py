"""Tickets survive the disk bit for bit; whatever is not a usable ticket is refused with a reason."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse import Ticket
from deploy_sparse.artifact import write_artifact
from deploy_sparse.errors import ArtifactError, TicketError
from deploy_sparse.structure import Block, Blocks, Channels, Dense, Unstructured, density, row_density, structure_of
from deploy_sparse.ticket import ModelRef, Provenance


def make(shape=(4, 3, 3, 3), seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    weights = {"conv.weight": torch.randn(*shape, generator=generator), "bn.running_mean": torch.zeros(shape[0])}
    mask = torch.rand(*shape, generator=generator) > 0.4
    mask.view(-1)[0] = True
    values = {"weights": weights, "masks": {"conv.weight": mask}, "model": ModelRef("net", {"width": 4}, (3, 8, 8)),
              "provenance": Provenance("test", metrics={"validation_accuracy": 0.5})}  # fmt: skip
    return Ticket(**{**values, **changes})


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_round_trip_is_bit_exact(tmp_path_factory, shape, seed):
    ticket = make(tuple(shape), seed)
    folder = tmp_path_factory.mktemp("t") / "ticket"
    ticket.save(folder)
    loaded = Ticket.load(folder)
    assert loaded.hash == ticket.hash
    assert (loaded.model, loaded.provenance) == (ticket.model, ticket.provenance)
    for name, weight in ticket.weights.items():
        assert torch.equal(loaded.weights[name], weight)
    assert torch.equal(loaded.masks["conv.weight"], ticket.masks["conv.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_survive(tmp_path, dtype):
    ticket = make()
    ticket = make(weights={name: w.to(dtype) for name, w in ticket.weights.items()})
    ticket.save(tmp_path / "t")
    assert Ticket.load(tmp_path / "t").weights["conv.weight"].dtype == dtype
    assert Ticket.load(tmp_path / "t").hash == ticket.hash


def test_the_hash_sees_weights_masks_model_and_provenance():
    base = make()
    flipped = {"conv.weight": ~base.masks["conv.weight"]}
    others = [
        make(seed=1),
        make(masks=flipped),
        make(model=ModelRef("other")),
        make(provenance=Provenance("test", seed=1)),
    ]
    assert len({t.hash for t in [base, *others]}) == 5


def test_masked_weights_are_zero_where_masked_and_nowhere_else():
    ticket = make()
    mask, weight = ticket.masks["conv.weight"], ticket.weights["conv.weight"]
    masked = ticket.masked_weights()["conv.weight"]
    assert bool((masked[~mask] == 0).all())
    assert torch.equal(masked[mask], weight[mask])


def test_the_json_is_readable(tmp_path):
    make().save(tmp_path / "t")
    content = json.loads((tmp_path / "t" / "ticket.json").read_text())
    assert content["model"] == {"name": "net", "arguments": {"width": 4}, "input_shape": [3, 8, 8]}
    assert content["layers"]["conv.weight"]["structure"] == "unstructured"
    assert 0 < content["density"] < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": {"conv.wieght": torch.ones(4, 3, 3, 3, dtype=torch.bool)}}, r"belongs to no weight[\s\S]*did you mean 'conv.weight'"),
        ({"masks": {"conv.weight": torch.ones(4, 3, 3, 2, dtype=torch.bool)}}, r"shape \(4, 3, 3, 2\), its weight \(4, 3, 3, 3\)"),
        ({"masks": {"conv.weight": torch.ones(4, 3, 3, 3)}}, r"dtype torch.float32[\s\S]*mask != 0"),
        ({"masks": {"conv.weight": torch.zeros(4, 3, 3, 3, dtype=torch.bool)}}, r"'conv.weight' has no channel left[\s\S]*prune less"),
        ({"weights": {"conv.weight": torch.full((4, 3, 3, 3), float("nan"))}}, r"'conv.weight' has 108 entries that are NaN"),
    ],
)  # fmt: skip
def test_unusable_tickets_are_refused_and_not_written(tmp_path, change, message):
    with pytest.raises(TicketError, match=message):
        make(**change).save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_is_refused_with_the_differences():
    with pytest.raises(
        TicketError,
        match=r"another architecture[\s\S]*has other shapes: weight \(4, 2, 3, 3\) instead of \(4, 3, 3, 3\)",
    ):
        make(weights={"weight": torch.ones(4, 2, 3, 3)}, masks={}).validate(torch.nn.Conv2d(3, 4, 3, bias=False))
    with pytest.raises(TicketError, match=r"it lacks weight, bias; has unknown conv.weight, bn.running_mean"):
        make().validate(torch.nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    make().save(tmp_path / "t")
    path = tmp_path / "t" / "ticket.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-7] ^= 4
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=r"ticket.safetensors is damaged[\s\S]*deploy-sparse run"):
        Ticket.load(tmp_path / "t")


def test_loading_imports_no_training_code(tmp_path):
    make().save(tmp_path / "t")
    program = (
        "import sys; from deploy_sparse import Ticket; Ticket.load(sys.argv[1]);"
        "bad = [m for m in sys.modules if m.startswith(('deploy_sparse.train', 'deploy_sparse.zoo', 'deploy_sparse.sparsify', 'torchvision', 'sklearn'))];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "t")], check=True)


def test_structures():
    rows = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    rows[[1, 3]] = True
    assert structure_of(rows) == Channels((1, 3))
    rows[:, 2] = False  # the consumer lost an input channel as well
    assert structure_of(rows) == Channels((1, 3))
    assert structure_of(torch.ones(2, 2, dtype=torch.bool)) == Dense()
    partly = torch.ones(2, 2, dtype=torch.bool)
    partly[0, 0] = False
    assert structure_of(partly) == Unstructured(0.75)
    assert density({"w": partly, "bias": torch.zeros(9, dtype=torch.bool)}) == 0.75
    assert density({}) == 1.0


def test_summary_is_json():
    summary = make().summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["layers"][0]["layer"] == "conv.weight"


def test_the_summary_counts_blocks():
    mask = torch.zeros(20, 3, 3, 3, dtype=torch.bool)
    mask[:8, :2] = mask[8:18, 1, 1] = True
    summary = make((20, 3, 3, 3), masks={"conv.weight": mask}).summary()
    assert summary["layers"] == [
        {"layer": "conv.weight", "shape": [20, 3, 3, 3], "structure": "blocks", "blocks": 2, "of": 20,
         "rows": [8, 10], "columns": [18, 3], "density": round(174 / 540, 6)}
    ]  # fmt: skip
    assert json.loads(json.dumps(summary)) == summary


def test_a_consistent_artifact_that_is_no_ticket_is_refused(tmp_path):
    body = {"model": {"name": "n", "arguments": [], "input_shape": []}, "provenance": {"method": "m"}, "masks": {}}
    for number, (payload, changed) in enumerate(
        [({}, body), ({"ticket.safetensors": b"no tensors"}, body), ({"ticket.safetensors": b""}, {}),
         ({"ticket.safetensors": artifact_bytes()}, {**body, "masks": {"w": [2]}})]
    ):  # fmt: skip
        write_artifact(tmp_path / str(number), "ticket", payload, changed)
        with pytest.raises(ArtifactError, match="is not a readable ticket"):
            Ticket.load(tmp_path / str(number))


def artifact_bytes():
    from safetensors.torch import save

    return save({"weight/w": torch.ones(2)})


def test_views_of_a_larger_tensor_are_saved_alone(tmp_path):
    whole = torch.arange(12.0)
    ticket = make(weights={"a": whole[:4], "b": whole[2:6]}, masks={})
    ticket.save(tmp_path / "t")
    assert torch.equal(Ticket.load(tmp_path / "t").weights["b"], whole[2:6])
    assert (tmp_path / "t" / "ticket.safetensors").stat().st_size < 400


def test_masked_kernel_positions_are_no_channels():
    taps = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    taps[:, :, 0] = True
    block = Block((0, 1, 2, 3), (0, 1, 2, 9, 10, 11, 18, 19, 20))
    assert structure_of(taps) == Blocks((block,))


def test_the_share_of_weights_in_kept_channels():
    mask = torch.zeros(4, 2, dtype=torch.bool)
    mask[0, 0] = mask[1] = True
    assert row_density({"w": mask}) == 0.5
    assert row_density({}) == 1.0

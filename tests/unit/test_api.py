"""The public calls: zoo names, targets and formats are resolved, and refused by name."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import deploy_sparse
from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError, SurgeryError, TicketError
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.sparsify.regroup import RegroupRule
from deploy_sparse.structure import Blocks, Channels, Dense, density, structure_of
from deploy_sparse.ticket import ModelRef, Provenance, Ticket


def zoo_ticket(kept=5):
    torch.manual_seed(0)
    arguments = {"widths": [8, 8, 8]}
    weights = zoo.build("resnet_digits", **arguments).state_dict()
    rows = torch.arange(8) < kept
    name = "stages.0.0"
    masks = {
        f"{name}.conv1.weight": rows.reshape(8, 1, 1, 1).expand(8, 8, 3, 3),
        f"{name}.bn1.weight": rows,
        f"{name}.bn1.bias": rows,
    }
    return Ticket(weights, masks, ModelRef("resnet_digits", arguments, (1, 8, 8)), Provenance("by hand"))


def test_a_zoo_ticket_needs_no_factory_from_disk_to_network(tmp_path):
    folder = zoo_ticket().save(tmp_path / "ticket")
    small = deploy_sparse.compact(folder)
    assert small.module.stages[0][0].conv1.weight.shape == (5, 8, 3, 3)
    assert small.parity.float64.max_rel <= 1e-10
    small.save(tmp_path / "compact")
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(deploy_sparse.load_compact(tmp_path / "compact")(images), small.module(images))


def test_a_target_rounds_widths_up_to_what_it_likes():
    assert deploy_sparse.compact(zoo_ticket(5), target="rtx-sm89").module.stages[0][0].conv1.weight.shape[0] == 8
    assert deploy_sparse.compact(zoo_ticket(3), target="cpu").module.stages[0][0].conv1.weight.shape[0] == 4


def test_a_network_of_ones_own_needs_its_factory(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    ticket = Ticket(model.state_dict(), {}, ModelRef("user factory", input_shape=(3, 8, 8)), Provenance("by hand"))
    with pytest.raises(
        TicketError, match=r"'user factory', which is no zoo network[\s\S]*compact\(ticket, factory=…\)"
    ):
        deploy_sparse.compact(ticket)

    def factory():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    deploy_sparse.compact(ticket, factory=factory).save(tmp_path / "c")
    with pytest.raises(TicketError, match=r"load_compact\(folder, factory=…\)"):
        deploy_sparse.load_compact(tmp_path / "c")
    assert deploy_sparse.load_compact(tmp_path / "c", factory=factory)(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 6, 6)


def test_unknown_formats_and_targets_are_refused():
    with pytest.raises(ConfigError, match="format 'blocks'"):
        deploy_sparse.compact(zoo_ticket(), format="blocks")
    with pytest.raises(ConfigError, match="unknown target 'gpu'"):
        deploy_sparse.compact(zoo_ticket(), target="gpu")


def test_a_compact_network_brings_its_example_inputs_to_the_builder(tmp_path):
    engine = deploy_sparse.build_engine(deploy_sparse.compact(zoo_ticket()), "cpu", out=tmp_path)
    with engine.open() as runner:
        assert runner.run(runner.sample_inputs(2))["output"].shape == (2, 10)


class Residual(nn.Module):
    """A stem and a block that write one stream of ten channels, and an inner layer of seven."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.a, self.norm1 = nn.Conv2d(10, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.b, self.norm2 = nn.Conv2d(7, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.norm0(self.stem(x)))
        x = torch.relu(x + self.norm2(self.b(torch.relu(self.norm1(self.a(x))))))
        return self.fc(x.mean(dim=(2, 3)))


def perceptron():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 4))


def separable():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


OWN = {
    "residual": (Residual, (3, 6, 6), {"stem.weight": 10, "a.weight": 7, "b.weight": 10}),
    "perceptron": (perceptron, (6,), {"0.weight": 16, "2.weight": 9}),
    "separable": (separable, (3, 6, 6), {"0.weight": 8, "6.weight": 12}),
}


def trained_like(factory):
    """Weights and statistics away from their neutral values, in training mode with gradients."""
    torch.manual_seed(0)
    model = factory()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name.endswith("running_var") else tensor.normal_()
    return model


def samples(shape, count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=generator), torch.randint(4, (count,), generator=generator)


@pytest.mark.parametrize("score", ["l1", "l2", "random", "activation_l1", "activation_l2", "saliency"])
@pytest.mark.parametrize("name", OWN)
def test_one_call_narrows_any_network_exactly(name, score):
    factory, shape, widths = OWN[name]
    model = trained_like(factory)
    images, labels = samples(shape)
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    ticket = deploy_sparse.oneshot_ticket(model, images, sparsity=0.3, score=score, batches=[(images, labels)])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert modes == [part.training for part in model.modules()]
    small = deploy_sparse.compact(ticket, factory=factory)  # verifies that both compute the same
    for weight, size in widths.items():
        assert small.module.get_parameter(weight).shape[0] == math.ceil(0.7 * size)
        assert int(ticket.masks[weight].flatten(1).any(dim=1).sum()) == math.ceil(0.7 * size)
    smaller, whole = (sum(p.numel() for p in m.parameters()) for m in (small.module, model))
    assert smaller < 0.75 * whole
    if name == "separable":
        assert small.module[3].weight.shape == (6, 1, 3, 3)  # depthwise filters go with their channels
        assert small.module[3].groups == 6


def test_without_silence_only_rows_are_masked():
    model = trained_like(Residual)
    images = samples((3, 6, 6))[0]
    loud = deploy_sparse.oneshot_ticket(model, images, "channels", 0.5, "l1", False)
    silent = deploy_sparse.oneshot_ticket(model, images, "channels", 0.5, "l1", True)
    assert set(loud.masks) == {"stem.weight", "a.weight", "b.weight"}
    assert {"norm0.weight", "norm0.bias", "norm1.bias", "stem.bias", "fc.weight"} <= set(silent.masks)
    for name, mask in loud.masks.items():
        rows = mask.flatten(1)
        assert torch.equal(rows.any(dim=1), rows.all(dim=1))
        assert torch.equal(rows.any(dim=1), silent.masks[name].flatten(1).any(dim=1))
    assert torch.equal(loud.masks["stem.weight"].flatten(1).any(dim=1), loud.masks["b.weight"].flatten(1).any(dim=1))


def test_the_scores_decide_which_channels_stay():
    model = perceptron()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[[2, 11]] = 3.0
    ticket = deploy_sparse.oneshot_ticket(model, torch.zeros(2, 6), sparsity=0.875)
    assert ticket.masks["0.weight"].any(dim=1).nonzero().flatten().tolist() == [2, 11]
    lots = [
        deploy_sparse.oneshot_ticket(model, torch.zeros(2, 6), score="random", seed=seed).hash for seed in (0, 0, 1)
    ]
    assert lots[0] == lots[1] != lots[2]


@pytest.mark.parametrize("score", ["l1", "magnitude", "random", "snip", "grasp", "synflow"])
def test_single_weights_by_any_source(score):
    model = trained_like(Residual)
    images, labels = samples((3, 6, 6))
    ticket = deploy_sparse.oneshot_ticket(model, images, "unstructured", 0.8, score, batches=[(images, labels)])
    assert set(ticket.masks) == {"stem.weight", "a.weight", "b.weight"}
    total = sum(mask.numel() for mask in ticket.masks.values())
    assert abs(density(ticket.masks) - 0.2) <= 1 / total
    if score in ("l1", "magnitude"):
        kept, gone = ([model.get_parameter(n)[m if k else ~m] for n, m in ticket.masks.items()] for k in (True, False))
        assert torch.cat(kept).abs().min() >= torch.cat(gone).abs().max()


def test_other_distributions_and_multiples():
    model, x = trained_like(separable), samples((3, 6, 6))[0]
    layers = {n: m for n, m in dense_masks(model).items() if n != "3.weight"}
    total = sum(m.numel() for m in layers.values())
    for kind in ("global", "erk"):
        ticket = deploy_sparse.oneshot_ticket(model, x, distribution=kind, sparsity=0.4, silent=False)
        rows = {n: ticket.masks[n].flatten(1).any(dim=1) for n in layers}
        left = sum(int(r.sum()) * layers[n][0].numel() for n, r in rows.items())
        assert 0.6 * total <= left <= 0.6 * total + sum(m[0].numel() for m in layers.values())
    wide = deploy_sparse.oneshot_ticket(model, x, sparsity=0.7, multiple=4)
    assert [int(wide.masks[n].flatten(1).any(dim=1).sum()) for n in layers] == [4, 4]


def test_blocks_are_dense_and_as_many_positions_as_asked_for():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, groups=2),
        nn.Conv2d(64, 64, 3),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    x = torch.zeros(2, 16, 7, 7)
    ticket = deploy_sparse.oneshot_ticket(model, x, "blocks", 0.5)
    assert set(n for n, m in ticket.masks.items() if m.dim() == 4) == {"0.weight", "2.weight", "3.weight"}
    assert bool(ticket.masks["2.weight"].all())  # a convolution in groups
    assert ticket.provenance.metrics == {"dense_layers": 1, "density": round(density(ticket.masks), 6)}
    assert any(isinstance(structure_of(m), Blocks) for m in ticket.masks.values())
    assert all(isinstance(structure_of(m), Blocks | Channels | Dense) for m in ticket.masks.values())
    assert density({n: ticket.masks[n] for n in ("0.weight", "3.weight")}) == pytest.approx(0.5, abs=0.05)
    rule = RegroupRule(rule="budget", columns="channel")
    by_channel = deploy_sparse.oneshot_ticket(model, x, "blocks", 0.5, silent=False, rule=rule)
    assert set(by_channel.masks) == {"0.weight", "2.weight", "3.weight"}
    assert by_channel.provenance.config["rule"]["columns"] == "channel"


def test_the_ticket_says_where_it_comes_from_and_survives_the_disk(tmp_path):
    model, x = trained_like(Residual), torch.zeros(2, 3, 6, 6)
    ticket = deploy_sparse.oneshot_ticket(model, (x,), sparsity=0.25, exclude=("a.*",), seed=3)
    assert ticket.model == ModelRef("user factory", input_shape=(3, 6, 6))
    assert (ticket.provenance.method, ticket.provenance.seed) == ("oneshot", 3)
    assert ticket.provenance.config == {
        "pattern": "channels", "sparsity": 0.25, "score": "l1", "silent": True, "distribution": "uniform",
        "multiple": 1, "exclude": ["a.*"], "rule": None,
    }  # fmt: skip
    assert "a.weight" not in ticket.masks or bool(ticket.masks["a.weight"].flatten(1).any(dim=1).all())
    assert Ticket.load(ticket.save(tmp_path / "t")).hash == ticket.hash
    with torch.no_grad():
        model.fc.bias.zero_()
    assert not torch.equal(ticket.weights["fc.bias"], model.fc.bias)  # the ticket holds copies


def test_a_zoo_network_named_as_such_needs_no_factory():
    arguments = {"widths": [8, 8, 8]}
    reference = ModelRef("resnet_digits", arguments, (1, 8, 8))
    ticket = deploy_sparse.oneshot_ticket(
        zoo.build("resnet_digits", **arguments), torch.zeros(2, 1, 8, 8), reference=reference
    )
    assert deploy_sparse.compact(ticket).module.conv1.weight.shape[0] == 4


def test_torchvision_networks_are_known_by_name():
    from deploy_sparse.api import zoo_factory

    assert callable(zoo_factory(ModelRef("torchvision/resnet18"), ""))
    with pytest.raises(TicketError, match=r"'torchvision/nothing', which is no zoo network"):
        zoo_factory(ModelRef("torchvision/nothing"), "")


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pattern": "chanels"}, ConfigError, r"pattern 'chanels'[\s\S]*did you mean 'channels'"),
        ({"score": "l3"}, ConfigError, r"score for pattern 'channels': 'l3'[\s\S]*l1, l2, random"),
        ({"score": "magnitude"}, ConfigError, r"score for pattern 'channels': 'magnitude'"),
        ({"pattern": "unstructured", "score": "saliency"}, ConfigError, r"'saliency'[\s\S]*magnitude, snip, grasp, synflow"),
        ({"sparsity": 1.0}, ConfigError, r"sparsity 1.0[\s\S]*\[0, 1\)"),
        ({"sparsity": -0.1}, ConfigError, r"sparsity -0.1"),
        ({"sparsity": float("nan")}, ConfigError, r"sparsity nan"),
        ({"score": "saliency"}, ConfigError, r"score 'saliency' without data[\s\S]*batches="),
        ({"pattern": "unstructured", "score": "snip"}, ConfigError, r"score 'snip' without data"),
        ({"distribution": "even"}, ConfigError, r"unknown distribution 'even'"),
        ({"distribution": "layer"}, ConfigError, r"unknown distribution 'layer'[\s\S]*uniform, global, erk"),
        ({"sparsity": "0.5"}, ConfigError, r"sparsity '0.5'[\s\S]*a number in \[0, 1\)"),
        ({"sparsity": torch.tensor(0.5)}, ConfigError, r"sparsity tensor\(0.5"),
        ({"sparsity": True}, ConfigError, r"sparsity True"),
        ({"score": "saliency", "batches": [(torch.zeros(0, 3, 6, 6), torch.zeros(0).long())]}, ConfigError, r"is empty"),
        ({"score": "saliency", "batches": [torch.zeros(2, 3, 6, 6)]}, ConfigError, r"batch 0 is no pair of tensors"),
        ({"score": "saliency", "batches": [(torch.zeros(2, 3, 6, 6), torch.tensor([0, 9]))]}, ConfigError, r"labels from 0 to 9"),
        ({"sparsity": 1e-6}, ConfigError, r"sparsity 1e-06 with pattern 'channels', by which nothing goes\n"),
        ({"sparsity": 0.5, "pattern": "blocks", "rule": RegroupRule(min_nonzeros=10)}, ConfigError,
         r"with pattern 'blocks', by which nothing goes: no 10 or more rows[\s\S]*empty='prune'"),
        ({"multiple": 0}, ConfigError, r"multiple 0"),
        ({"multiple": 8, "pattern": "unstructured"}, ConfigError, r"multiple with pattern 'unstructured'"),
        ({"rule": RegroupRule()}, ConfigError, r"rule with pattern 'channels'"),
        ({"exclude": ("conv9.*",)}, ConfigError, r"'conv9.\*' matches no layer that can be narrowed[\s\S]*stem.weight"),
        ({"exclude": ("stem.*", "a.*")}, ConfigError, r"no layer can be narrowed: network output"),
        ({"model": nn.Conv2d(3, 4, 3)}, ConfigError, r"no layer can be narrowed: network output"),
        ({"model": nn.Sequential(weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU(), nn.Conv2d(4, 2, 1))}, ConfigError,
         r"network output; '0.weight' is computed from '0.parametrizations.weight.original0'"
         r"[\s\S]*parametrize.remove_parametrizations\(module, 'weight'\), with module = 0$"),
        ({"model": Branching()}, SurgeryError, r"cannot be traced"),
        ({"example_inputs": torch.zeros(2, 5, 6, 6)}, SurgeryError, r"cannot be traced"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_at_once_is_refused(options, error, message):
    torch.manual_seed(0)
    with pytest.raises(error, match=message):
        deploy_sparse.oneshot_ticket(**{"model": Residual(), "example_inputs": torch.zeros(2, 3, 6, 6), **options})


def test_the_density_reached_is_among_the_metrics():
    model, x = trained_like(Residual), torch.zeros(2, 3, 6, 6)
    for pattern in ("channels", "unstructured"):
        ticket = deploy_sparse.oneshot_ticket(model, x, pattern)
        assert ticket.provenance.metrics == {"density": round(density(ticket.masks), 6)}
    assert deploy_sparse.oneshot_ticket(model, x, sparsity=0).provenance.metrics == {"density": 1.0}


def test_a_pattern_alone_is_one_pattern():
    model = perceptron()
    ticket = deploy_sparse.oneshot_ticket(model, torch.zeros(2, 6), exclude="0.weight")
    assert ticket.provenance.config["exclude"] == ["0.weight"]
    assert bool(ticket.masks.get("0.weight", torch.ones(1)).all())
    assert int(ticket.masks["2.weight"].any(dim=1).sum()) == 5


@pytest.mark.parametrize("score", ["l1", "random"])
def test_every_part_of_a_stream_that_the_same_layers_write_gets_narrower(score):
    """ResNet-20 with option A: channels 0-15 have ten writers, 16-31 six, 32-63 three."""
    arguments = {"classes": 4}
    model = zoo.build("resnet20", **arguments)
    reference = ModelRef("resnet20", arguments, (3, 16, 16))
    ticket = deploy_sparse.oneshot_ticket(model, torch.zeros(2, 3, 16, 16), score=score, reference=reference)
    kept = ticket.masks["stages.2.2.conv2.weight"].flatten(1).any(dim=1)
    assert [int(part.sum()) for part in kept.split([16, 16, 32])] == [8, 8, 16]


def test_tied_weights_are_pruned_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    ticket = deploy_sparse.oneshot_ticket(model, torch.zeros(2, 4), "unstructured")
    assert int(ticket.masks["0.weight"].sum()) == 8

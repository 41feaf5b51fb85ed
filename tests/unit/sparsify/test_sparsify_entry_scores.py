"""Scores of single weights against brute force: switches, finite differences, explicit Hessians, conservation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify import entry_scores
from deploy_sparse.sparsify.imp import dense_masks


class Tiny(nn.Module):
    """Two convolutions with BatchNorm, a shortcut and dropout; float64, so that differences can be taken."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(3, 4)

    def forward(self, x):
        x = nn.functional.softplus(self.bn1(self.conv1(x)))  # smooth, for finite differences
        x = nn.functional.softplus(self.bn2(self.conv2(x)) + x)
        return self.fc(self.drop(x.mean(dim=(2, 3))))


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny().double()


def some_batches(count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator))
        for n in range(3, 3 + count)
    ]


def some_masks(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(m.shape, generator=generator) < 0.8 for n, m in dense_masks(model).items()}


def reference_loss(model, masks, batches, switches=None, temperature=1.0):
    """Mean cross-entropy of a masked copy, BatchNorm in training mode, dropout off; optionally with switches c ⊙ w."""
    model = copy.deepcopy(model)
    model.train()
    model.drop.eval()
    weights = {n: (p.detach() * masks[n] if n in masks else p.detach()) for n, p in model.named_parameters()}
    if switches is not None:
        weights |= {n: weights[n] * c for n, c in switches.items()}
    losses = [
        functional.cross_entropy(torch.func.functional_call(model, weights, (x,)) / temperature, y, reduction="sum")
        for x, y in batches
    ]
    return sum(losses) / sum(len(y) for _, y in batches)


def snapshot(model):
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "frozen": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": sum(len(m._forward_hooks) for m in model.modules()),
    }


def same(left, right):
    assert left["modes"] == right["modes"]
    assert left["frozen"] == right["frozen"]
    assert left["hooks"] == right["hooks"]
    assert all(torch.equal(left["state"][n], right["state"][n]) for n in left["state"])
    for n, grad in left["grads"].items():
        assert (grad is None and right["grads"][n] is None) or torch.equal(grad, right["grads"][n])


def test_snip_is_the_slope_of_the_loss_along_each_switch():
    model, batches = tiny(), some_batches()
    masks = some_masks(model)
    switches = {n: torch.ones(m.shape, dtype=torch.float64, requires_grad=True) for n, m in masks.items()}
    loss = reference_loss(model, masks, batches, switches)
    slopes = torch.autograd.grad(loss, list(switches.values()))
    found = entry_scores.snip(model, masks, batches)
    for name, slope in zip(masks, slopes, strict=True):
        torch.testing.assert_close(found[name], slope.abs(), rtol=1e-9, atol=1e-12)
        assert bool((found[name][~masks[name]] == 0).all())


def test_snip_against_finite_differences():
    model, batches = tiny(), some_batches(1)
    masks = dense_masks(model)
    found = entry_scores.snip(model, masks, batches)
    step = 1e-5
    for position in ((0, 0, 1, 1), (2, 1, 0, 2)):
        losses = []
        for sign in (1, -1):
            switches = {n: torch.ones(m.shape, dtype=torch.float64) for n, m in masks.items()}
            switches["conv1.weight"][position] += sign * step
            losses.append(float(reference_loss(model, masks, batches, switches)))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(found["conv1.weight"][position]) == pytest.approx(abs(slope), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_the_weight_times_the_hessian_gradient_product(temperature):
    model, batches = tiny(), some_batches()
    masks = some_masks(model)
    names = list(masks)
    start = torch.cat([(model.get_parameter(n).detach() * masks[n]).flatten() for n in names])
    sizes = [masks[n].numel() for n in names]

    def loss(flat):
        parts = flat.split(sizes)
        weights = {n: p.reshape(masks[n].shape) for n, p in zip(names, parts, strict=True)}
        scratch = copy.deepcopy(model).train()
        scratch.drop.eval()
        losses = [
            functional.cross_entropy(
                torch.func.functional_call(scratch, weights, (x,)) / temperature, y, reduction="sum"
            )
            for x, y in batches
        ]
        return sum(losses) / sum(len(y) for _, y in batches)

    gradient = torch.autograd.functional.jacobian(loss, start)
    hessian = torch.autograd.functional.hessian(loss, start)  # the whole matrix: another way than a product
    expected = start * (hessian @ gradient)
    found = entry_scores.grasp(model, masks, batches, temperature=temperature)
    torch.testing.assert_close(torch.cat([found[n].flatten() for n in names]), expected, rtol=1e-7, atol=1e-16)


def test_grasp_says_how_the_squared_gradient_norm_changes_when_a_weight_shrinks():
    model, batches = tiny(), some_batches(1)
    masks = dense_masks(model)
    found = entry_scores.grasp(model, masks, batches, temperature=1.0)

    def squared_norm(scale, position):
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if n in masks}
        weights["conv2.weight"][position] *= scale
        leaves = {n: w.requires_grad_() for n, w in weights.items()}
        scratch = copy.deepcopy(model).train()
        scratch.drop.eval()
        loss = functional.cross_entropy(torch.func.functional_call(scratch, leaves, (batches[0][0],)), batches[0][1])
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(leaves.values())))

    step, position = 1e-4, (1, 2, 1, 1)
    slope = (squared_norm(1 + step, position) - squared_norm(1 - step, position)) / (2 * step)
    assert slope / 2 == pytest.approx(float(found["conv2.weight"][position]), rel=1e-4)


@pytest.mark.parametrize("score", [entry_scores.snip, entry_scores.grasp])
def test_several_batches_are_one_mean_over_all_samples_where_no_batchnorm_is(score):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)).double()
    masks = dense_masks(model)
    batches = some_batches(3)
    joined = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    torch.testing.assert_close(score(model, masks, batches), score(model, masks, joined))


class Rectified(nn.Module):
    """A chain with a residual block, max pooling and BatchNorm away from its neutral values."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.hidden, self.fc = nn.Linear(4 * 4, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = functional.max_pool2d(x, 2).flatten(1)
        return self.fc(torch.relu(self.hidden(x)))


def rectified():
    torch.manual_seed(3)
    model = Rectified()
    with torch.no_grad():
        for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean):
            tensor.normal_()
        model.norm.running_var.uniform_(0.5, 2.0)
    return model


def test_synflow_conserves_flow():
    model = rectified()
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
    masks["hidden.weight"] = torch.rand(masks["hidden.weight"].shape) < 0.7
    found = entry_scores.synflow(model, masks, (torch.randn(2, 2, 4, 4),))
    sums = {n: float(s.sum()) for n, s in found.items()}
    # every layer that carries all of the flow has the same sum; the two of the branch share theirs
    assert sums["stem.weight"] == pytest.approx(sums["fc.weight"], rel=1e-12)
    assert sums["hidden.weight"] == pytest.approx(sums["fc.weight"], rel=1e-12)
    assert sums["a.weight"] == pytest.approx(sums["b.weight"], rel=1e-12)
    assert 0 < sums["a.weight"] < sums["fc.weight"]
    assert all(bool((s >= 0).all()) and s.dtype == torch.float64 for s in found.values())
    assert bool((found["hidden.weight"][~masks["hidden.weight"]] == 0).all())


def test_synflow_of_a_chain_is_the_product_along_all_paths():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
    found = entry_scores.synflow(model, masks, (torch.zeros(1, 3),))
    first, second = model[0].weight.detach().double().abs(), model[2].weight.detach().double().abs()
    torch.testing.assert_close(found["0.weight"], first * second.sum(dim=0)[:, None])
    torch.testing.assert_close(found["2.weight"], second * first.sum(dim=1))


def test_synflow_does_not_overflow_where_float32_would():
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(20)))
    with torch.no_grad():
        for part in model:
            part.weight.fill_(1.0)
    found = entry_scores.synflow(model, dense_masks(model), (torch.zeros(1, 64, 3, 3),))
    assert float(found["0.weight"].max()) > 3.5e38
    assert all(bool(torch.isfinite(s).all()) for s in found.values())


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4)])
def test_synflow_refuses_norms_that_hide_the_flow(norm):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), norm)
    with pytest.raises(
        TicketError, match=rf"SynFlow on a network with {type(norm).__name__} \('1'\)[\s\S]*'magnitude'"
    ):
        entry_scores.synflow(model, {"0.weight": torch.ones(4, 2, 1, 1, dtype=torch.bool)}, (torch.zeros(1, 2, 4, 4),))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_the_model_is_left_as_it_was(name, training):
    model, batches = tiny().train(training), some_batches()
    model.bn2.eval()  # a mix of modes
    model.fc.requires_grad_(False)
    model(batches[0][0]).sum().backward()
    before = snapshot(model)
    argument = (batches[0][0],) if name == "synflow" else batches
    with torch.no_grad():  # called from anywhere
        getattr(entry_scores, name)(model, dense_masks(model), argument)
    same(before, snapshot(model))


def test_a_layer_that_does_not_run_scores_zero():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.spare, self.fc = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 2, 1), nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.conv(x).mean(dim=(2, 3)))

    model, batches = Unused().double(), some_batches(1)
    for score in (entry_scores.snip, entry_scores.grasp):
        assert float(score(model, dense_masks(model), batches)["spare.weight"].abs().max()) == 0


def test_random_scores_are_a_function_of_the_seed():
    masks = {"a": torch.ones(3, 4, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}
    first, again, other = (entry_scores.random(masks, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in masks)
    assert not torch.equal(first["a"], other["a"])
    assert first["a"].shape == (3, 4)


def test_what_cannot_be_scored_is_refused():
    model = tiny()
    for score in (entry_scores.snip, entry_scores.grasp):
        with pytest.raises(ConfigError, match=r"without data[\s\S]*batches="):
            score(model, dense_masks(model), [])
    with pytest.raises(TicketError, match=r"mask 'conv3.weight' belongs to no layer[\s\S]*did you mean"):
        entry_scores.snip(model, {"conv3.weight": torch.ones(1, dtype=torch.bool)}, some_batches())

"""Channel scores against plain loops over samples and channels."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.channel_scores import CRITERIA, OF_DATA, channel_scores, weight_l1


class Mixed(nn.Module):
    """Ordinary, depthwise and grouped convolutions, in-place activations, a Linear over positions and one over vectors."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.tokens, self.hidden, self.fc = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 3)
        self.act, self.drop = nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.depthwise(x))
        x = self.act(self.grouped(x))
        x = self.act(self.tokens(x.flatten(2).transpose(1, 2))).mean(dim=1)  # [N, T, 6] -> [N, 5]
        return self.fc(self.drop(self.act(self.hidden(x))))


LAYERS = ("stem", "depthwise", "grouped", "tokens", "hidden")


def mixed():
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    masks = {f"{n}.weight": torch.ones_like(model.get_parameter(f"{n}.weight"), dtype=torch.bool) for n in LAYERS}
    return model, masks


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 2, 4, 4, generator=generator), torch.randint(3, (n,), generator=generator)) for n in (3, 2)]


def leaky(x):
    return functional.leaky_relu(x, 0.1)


def feature_maps(model, images):
    """Each layer's output for one image as ``[c_out, positions]``, written out without hooks."""
    x = images[None]
    found = {"stem": model.stem(x)}
    found["depthwise"] = model.depthwise(leaky(model.norm(found["stem"])))
    found["grouped"] = model.grouped(leaky(found["depthwise"]))
    found["tokens"] = model.tokens(leaky(found["grouped"]).flatten(2).transpose(1, 2)).transpose(1, 2)
    found["hidden"] = model.hidden(leaky(found["tokens"]).mean(dim=2))
    logits = model.fc(leaky(found["hidden"]))
    return found, logits


@pytest.mark.parametrize(("criterion", "order"), [("activation_l1", 1), ("activation_l2", 2)])
def test_activation_norms_are_means_over_the_samples(criterion, order):
    model, masks = mixed()
    found = channel_scores(criterion, masks, model=model, batches=batches())
    model.eval()
    for layer in LAYERS:
        expected = []
        for images, _ in batches():
            for image in images:
                maps = feature_maps(model, image)[0][layer][0]  # [c_out, ...]
                expected.append([float(channel.detach().flatten().norm(order)) for channel in maps])
        score = found[f"{layer}.weight"]
        assert score.dtype == torch.float64
        torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64).mean(dim=0), rtol=1e-5, atol=1e-7)


def test_saliency_is_the_mean_of_activation_times_gradient_by_sample():
    model, masks = mixed()
    found = channel_scores("saliency", masks, model=model, batches=batches())
    model.eval()
    for layer in LAYERS:
        expected = []
        for images, labels in batches():
            for image, label in zip(images, labels, strict=True):
                maps, logits = feature_maps(model, image)
                slope = torch.autograd.grad(functional.cross_entropy(logits, label[None]), maps[layer])[0]
                effect = (maps[layer] * slope)[0].flatten(1) if layer != "hidden" else (maps[layer] * slope)[0][:, None]
                expected.append(effect.mean(dim=1).abs().tolist())
        expected = torch.tensor(expected, dtype=torch.float64).mean(dim=0)
        torch.testing.assert_close(found[f"{layer}.weight"], expected, rtol=1e-4, atol=1e-9)
        assert float(expected.max()) > 0


def test_a_channel_whose_map_is_zero_scores_zero():
    model, masks = mixed()
    with torch.no_grad():
        model.stem.weight[2] = 0
        model.stem.bias[2] = 0
    for criterion in OF_DATA:
        score = channel_scores(criterion, masks, model=model, batches=batches())["stem.weight"]
        assert float(score[2]) == 0
        assert bool((score[[0, 1, 3]] > 0).all())


def test_scores_of_weights_look_at_survivors_only():
    weight = torch.tensor([[3.0, -4.0], [1.0, 1.0], [5.0, 5.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    expected = {"l1": [7.0, 1.0, 0.0], "l2": [5.0, 1.0, 0.0], "survivors": [2.0, 1.0, 0.0]}
    for criterion, values in expected.items():
        found = channel_scores(criterion, {"w": mask}, weights={"w": weight})["w"]
        assert found.dtype == torch.float64
        assert found.tolist() == values
    assert weight_l1(weight, mask).tolist() == expected["l1"]


def test_the_models_own_weights_are_taken_where_none_are_given():
    model, masks = mixed()
    found = channel_scores("l1", masks, model=model)["stem.weight"]
    torch.testing.assert_close(found, model.stem.weight.detach().double().abs().sum(dim=(1, 2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("criterion", OF_DATA)
def test_the_model_is_left_as_it_was_even_when_a_batch_fails(criterion, frozen):
    model, masks = mixed()
    model.train()
    model.norm.eval()
    model.requires_grad_(not frozen)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    with torch.no_grad():
        score = channel_scores(criterion, masks, model=model, batches=batches())
    assert bool((score["hidden.weight"] > 0).any())
    broken = (torch.randn(2, 7, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        channel_scores(criterion, masks, model=model, batches=[broken])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_layer_used_twice_counts_both_maps():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.conv(self.conv(x)).mean(dim=(2, 3))

    torch.manual_seed(0)
    model = Twice()
    images, labels = torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 1])
    masks = {"conv.weight": torch.ones(2, 2, 1, 1, dtype=torch.bool)}
    found = channel_scores("activation_l1", masks, model=model, batches=[(images, labels)])["conv.weight"]
    once = model.conv(images).detach()
    both = once.abs().sum(dim=(2, 3)) + model.conv(once).detach().abs().sum(dim=(2, 3))
    torch.testing.assert_close(found, both.double().mean(dim=0), rtol=1e-5, atol=0)


def test_what_cannot_be_scored_is_refused():
    model, masks = mixed()
    assert CRITERIA == ("l1", "survivors", "activation_l1", "activation_l2", "saliency")
    with pytest.raises(ConfigError, match=r"unknown channel score 'salience'[\s\S]*did you mean 'saliency'"):
        channel_scores("salience", masks, model=model)
    with pytest.raises(ConfigError, match=r"'l1' without a network[\s\S]*or weights="):
        channel_scores("l1", masks)
    with pytest.raises(ConfigError, match=r"'saliency' without a network"):
        channel_scores("saliency", masks, weights={}, batches=batches())
    for criterion in OF_DATA:
        with pytest.raises(ConfigError, match=rf"score '{criterion}' without data[\s\S]*batches="):
            channel_scores(criterion, masks, model=model)
        for name, length in (("norm.weight", 4), ("sten.weight", 4), ("stem.weight", 9), ("stem.bias", 4)):
            with pytest.raises(TicketError, match=f"mask '{name}' belongs to no layer"):
                channel_scores(criterion, {name: torch.ones(length, dtype=torch.bool)}, model=model, batches=batches())


def test_a_layer_that_does_not_run_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.spare = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.conv(x).mean(dim=(2, 3))

    masks = {f"{n}.weight": torch.ones(3, 2, 1, 1, dtype=torch.bool) for n in ("conv", "spare")}
    for criterion in OF_DATA:
        with pytest.raises(TicketError, match=r"layer 'spare.weight' did not run"):
            channel_scores(criterion, masks, model=Unused(), batches=batches())

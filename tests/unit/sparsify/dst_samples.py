"""A small network in training under masks that move, step by step."""

import torch
from torch import nn

from deploy_sparse.sparsify.dst import DynamicMasks, initial_masks
from deploy_sparse.sparsify.exploration import Exploration
from deploy_sparse.sparsify.imp import dense_masks

INPUTS, CLASSES = 6, 4


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, CLASSES))


class Training:
    """A network that learns noise by steps; everything about step k is a function of k."""

    def __init__(self, method, kind=torch.optim.SGD, **options):
        self.model, self.method, self.taken = network(), method, 0
        method.start_(self.model)
        options = options or {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
        self.optimizer = kind(self.model.parameters(), **options)

    def step(self, *, spoil=False):
        generator = torch.Generator().manual_seed(self.taken)
        inputs = torch.randn(16, INPUTS, generator=generator)
        labels = torch.randint(CLASSES, (16,), generator=generator)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), labels).backward()
        if spoil:
            self.model[0].weight.grad.fill_(torch.inf)
        self.method.after_backward_(self.model, self.taken)
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        if not spoil:  # a scaler leaves such a step out
            self.optimizer.step()
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.method.after_step_(self.model, self.optimizer, self.taken)
        self.taken += 1
        return gradients, weights

    def steps(self, count):
        for _ in range(count):
            self.step()
        return self

    def masks(self):
        return {name: mask.clone() for name, mask in self.method.masks.items()}

    def counts(self):
        return {name: int(mask.sum()) for name, mask in self.method.masks.items()}


def masks(density=0.3, distribution="erk", seed=0):
    return initial_masks(dense_masks(network(), head=True), density, distribution, seed)


def method(density=0.3, **options):
    given = {"interval": 4, "stop": 100, **options}
    return DynamicMasks(masks(density), Exploration(**given), seed=3)

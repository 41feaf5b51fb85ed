"""A toy data set and network, and trainings of them that stop where a test wants."""

import torch
from torch import nn

from deploy_sparse.data.splits import Augmentation, Split, Splits
from deploy_sparse.errors import Interrupted
from deploy_sparse.sparsify.channel_schedule import ChannelSchedule
from deploy_sparse.sparsify.chase import Chase
from deploy_sparse.sparsify.coupling import channel_pools
from deploy_sparse.sparsify.dst import initial_masks
from deploy_sparse.sparsify.exploration import Exploration, SoftBound
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.train.loop import FitConfig, fit
from deploy_sparse.train.tensors import mask_

CONFIG = FitConfig(epochs=3, batch_size=8, lr=0.05, warmup_epochs=1, checkpoint_every=1)
STEPS = 3 * 3
MASKS = {"0.weight": torch.tensor([True, True, False, True]).reshape(4, 1, 1, 1).expand(4, 1, 3, 3)}


def splits(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def split(count):
        labels = torch.arange(count) % 3
        images = torch.randn(count, 1, 4, 4, generator=generator) + labels[:, None, None, None]
        return Split(images, labels)

    return Splits("toy", 3, (1, 4, 4), split(26), split(12), split(12), Augmentation(shift=1))


class Backwards(nn.Sequential):
    """Layers registered from the last to the first."""

    def __init__(self, *layers):
        super().__init__()
        for number, layer in reversed(list(enumerate(layers))):
            self.add_module(str(number), layer)

    def forward(self, images):
        for number in range(len(self)):
            images = self.get_submodule(str(number))(images)
        return images


def network():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )


def chase():
    """Half of the convolution's channels go in the nine steps, while its weights move every second one."""
    weights = dense_masks(network(), head=True)
    pools = channel_pools(weights, channel_groups(network(), (torch.zeros(2, 1, 4, 4),)), "prune_skip")
    moves = Exploration(2, STEPS, scope="global", soft=SoftBound(0.1, 7), gradient_batches=2)
    return Chase(initial_masks(weights, 0.3, "erk", 0), moves, pools, ChannelSchedule(0.5, 2, 1, 7))


def backwards():
    """Wide enough that the order in which gradients are sent decides the order in which they are summed."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        return Backwards(*first, nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 3))


class StopAfter:
    def __init__(self, polls):
        self.left = polls

    def __call__(self, *saved):
        self.left -= 1
        if self.left < 0:
            raise Interrupted(f"stopped: {' '.join(saved)}", signal_number=15, fix="go on")


class GradientMemory(Method):
    """A method with a state of its own: sums gradients, and lets the sum act on the weights."""

    def start_(self, model):
        self.total = torch.zeros_like(model[0].weight)

    def after_backward_(self, model, step):
        self.total = 0.9 * self.total + model[0].weight.grad

    @torch.no_grad()
    def after_step_(self, model, optimizer, step):
        model[0].weight.sub_(0.01 * (step + 1) * self.total)

    def state(self):
        return {"total": self.total}

    def restore_(self, state):
        self.total = state["total"].clone()


class Moving(Method):
    """Half of the first layer's weights survive; at some steps they become those with the largest gradients so far."""

    MOVES = (1, 4, 7)

    def __init__(self, ready_from=0):
        super().__init__()
        self.ready_from = ready_from

    def start_(self, model):
        weight = model[0].weight
        self.masks = {"0.weight": torch.zeros_like(weight, dtype=torch.bool)}
        self.masks["0.weight"].view(-1)[::2] = True
        self.total, self.moved = torch.zeros_like(weight), 0
        mask_(model, self.masks)

    def after_backward_(self, model, step):
        self.total += model[0].weight.grad.abs()

    @torch.no_grad()
    def after_step_(self, model, optimizer, step):
        mask = self.masks["0.weight"]
        if step in self.MOVES:
            before = mask.clone()
            best = self.total.flatten().topk(mask.numel() // 2).indices
            mask.zero_().view(-1)[best] = True
            self.moved += int((mask != before).sum())
            self.total.zero_()
        for value in (model[0].weight, *optimizer.state[model[0].weight].values()):
            if value.shape == mask.shape:
                value.mul_(mask)

    def ready(self, step):
        return step >= self.ready_from

    def figures(self):
        return {"moved": float(self.moved)}

    def state(self):
        return {"mask": self.masks["0.weight"], "total": self.total, "moved": torch.tensor(self.moved)}

    def restore_(self, state):
        self.masks = {"0.weight": state["mask"].clone()}
        self.total, self.moved = state["total"].clone(), int(state["moved"])


def train(folder, poll=lambda saved: None, *, config=CONFIG, method=None, **options):
    method = method or StaticMasks(MASKS)
    options = {"keep_epoch": 1, **options}
    return fit(network(), splits(), config, method, seed=3, checkpoints=folder, poll=poll, **options)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)

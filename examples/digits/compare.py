"""Train two copies of a model side by side, and measure what each costs."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call, grad, jvp

import jacobian_ops

from .model import Transformer

PROVIDERS = ("native", "jacobian_ops")
WARM_UP = 5  # steps or calls that are not timed


@dataclass
class Digits:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels as 16 patches of 2x2, split once."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Run:
    """What one provider did in one training."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = math.nan
    saved_bytes: int = 0

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the training."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])

    @property
    def step_seconds(self) -> float:
        """Median over the steps after the warm-up."""
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)


@dataclass
class Product:
    """A derivative through the trained model by both providers."""

    seconds: dict[str, float]
    relative_difference: float


def load(seed: int) -> Digits:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))
    x, y = patches[order], torch.tensor(digits.target)[order]
    return Digits(x[360:], y[360:], x[:360], y[:360])


def pair(model: Transformer) -> dict[str, Transformer]:
    """The model, and a copy of it on our ops."""
    return {"native": model, "jacobian_ops": jacobian_ops.replace(copy.deepcopy(model))}


def saved_bytes(model: Transformer, x: Tensor, y: Tensor) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(model(x), y)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def train(
    model: Transformer,
    digits: Digits,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    report: Callable,
) -> tuple[dict[str, Transformer], dict[str, Run]]:
    """Train the model and its copy on our ops with the same batches, step by step in turn.

    Args:
        model: With its first weights; it is trained in place.
        digits: The data.
        steps: Number of optimiser steps.
        batch: Images in a step.
        rate: Largest learning rate.
        seed: Of the order of the batches and of dropout.
        report: Called after each step with the losses of both.

    Returns:
        The trained models and what they did, each under the name of its provider.
    """
    models = pair(model)
    runs = {name: Run() for name in PROVIDERS}
    optimizers = {
        name: torch.optim.AdamW(m.parameters(), lr=rate, weight_decay=0.01)
        for name, m in models.items()
    }
    warm = max(1, steps // 10)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps))
        )
        for o in optimizers.values()
    ]
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for m in models.values():
        m.train()
    queue = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(queue) < batch:
            queue = torch.randperm(len(digits.x), generator=order)
        x, y = digits.x[queue[:batch]], digits.y[queue[:batch]]
        queue = queue[batch:]
        for name in PROVIDERS if step % 2 else reversed(PROVIDERS):
            start = time.perf_counter()
            loss = F.cross_entropy(models[name](x), y)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            runs[name].losses.append(loss.item())
            runs[name].seconds.append(time.perf_counter() - start)
        for schedule in schedules:
            schedule.step()
        report({name: run.losses[-1] for name, run in runs.items()})
    for name, m in models.items():
        runs[name].saved_bytes = saved_bytes(m, x, y)
        m.eval()
        with torch.no_grad():
            right = m(digits.test_x).argmax(-1) == digits.test_y
        runs[name].accuracy = right.float().mean().item()
    return models, runs


def products(
    model: Transformer, digits: Digits, batch: int, repeats: int, seed: int, report: Callable
) -> dict[str, Product]:
    """JVP of the logits and Hessian-vector product of the loss, in one direction of the weights.

    Args:
        model: A trained native model; a copy of it runs on our ops.
        digits: The data.
        batch: Images to derive at.
        repeats: Timed calls of each.
        seed: Of the direction.
        report: Called after each round.

    Returns:
        "jvp" and "hvp".
    """
    x, y = digits.test_x[:batch], digits.test_y[:batch]
    models = pair(model)
    generator = torch.Generator().manual_seed(seed)
    weights = {k: p.detach() for k, p in model.named_parameters()}
    direction = {k: torch.randn(p.shape, generator=generator) for k, p in weights.items()}

    def run_jvp(m):
        return jvp(lambda w: functional_call(m, w, x), (weights,), (direction,))[1].flatten()

    def run_hvp(m):
        def gradient(w):
            return grad(lambda w: F.cross_entropy(functional_call(m, w, x), y))(w)

        product = jvp(gradient, (weights,), (direction,))[1]
        return torch.cat([product[k].flatten() for k in weights])

    results = {}
    for kind, run in (("jvp", run_jvp), ("hvp", run_hvp)):
        seconds, value = {name: [] for name in PROVIDERS}, {}
        for i in range(WARM_UP + repeats):
            for name in PROVIDERS if i % 2 else reversed(PROVIDERS):
                start = time.perf_counter()
                value[name] = run(models[name])
                seconds[name].append(time.perf_counter() - start)
            report()
        difference = (value["jacobian_ops"] - value["native"]).norm() / value["native"].norm()
        medians = {name: statistics.median(s[WARM_UP:]) for name, s in seconds.items()}
        results[kind] = Product(medians, difference.item())
    return results

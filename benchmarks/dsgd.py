"""What a step of duality structure gradient descent costs, against a step of SGD, side by side in one process.

The network is 784-300-10 with a batch of 128. A step is zero_grad, forward, loss, backward and the update. All variants
take turns, so that a busy moment of the machine meets all of them; a ratio is the time of the SGD step over that of the
variant in the same turn. In the greedy variants the second layer wins, as it does throughout training; to let the first
one win, the two layers are given fixed squares p^2 that favour it. ``python -m benchmarks.dsgd``.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable

import torch

from lib import datasets, networks
from lib.factors import Factors
from lib.optimizers import DSGD

SIZES, BATCH, REPEATS, STEPS = (784, 300, 10), 128, 15, 8


def images(count: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """MNIST images in [0, 1], flat, and their labels, one-hot; random ones where there is no MNIST."""
    generator = torch.Generator().manual_seed(0)
    try:
        data = datasets.load("mnist")
    except datasets.DataUnavailable:
        labels = torch.randint(10, (count,), generator=generator)
        return torch.rand(count, 784, generator=generator) ** 4, torch.eye(10)[labels], "random images"
    chosen = torch.randperm(len(data.x_train), generator=generator)[:count]
    pixels = torch.tensor(data.x_train).flatten(1)[chosen].float() / data.pixel_max
    return pixels, torch.eye(10)[torch.tensor(data.y_train)[chosen]], data.provenance


def training_step(
    make: Callable[[torch.nn.Module], torch.optim.Optimizer],
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> Callable[[], torch.optim.Optimizer]:
    """One training step of a fresh network, as a function."""
    network = networks.feedforward(SIZES, torch.Generator().manual_seed(0))
    optimizer = make(network)

    def step():
        optimizer.zero_grad()
        (network(inputs) - targets).square().sum(-1).mean().backward()
        optimizer.step()
        return optimizer

    return step


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=1e-3)


def dsgd(first_wins: bool = False, captured: bool = False, **settings):
    """A maker of DSGD with tiny steps, so that the timed network stays where it is."""

    def make(network):
        first, second = network.parameters()
        layers = (
            [{"params": [first], "squares": 1.0}, {"params": [second], "squares": 1e4}]
            if first_wins
            else [first, second]
        )
        return DSGD(layers, lr=1e-6, factors=Factors(network) if captured else None, **settings)

    return make


def muon(network):
    return torch.optim.Muon(network.parameters(), lr=1e-6)


# Name, maker, the layer that must win (None: all move), the allowed multiple of an SGD step.
VARIANTS = [
    ("q = 2, greedy, .grad", dsgd(), 1, 1.5),
    ("q = 2, greedy, factors", dsgd(captured=True), 1, 1.5),
    ("q = 2, greedy, .grad, layer 1 wins", dsgd(True), 0, None),
    ("q = 2, greedy, factors, exact, layer 1 wins", dsgd(True, True), 0, None),
    ("q = 2, greedy, factors, polynomial, layer 1 wins", dsgd(True, True, method="polynomial"), 0, None),
    ("q = 2, all layers, .grad", dsgd(layers="all"), None, None),
    ("q = 2, all layers, factors, exact", dsgd(captured=True, layers="all"), None, None),
    ("q = 2, all layers, factors, polynomial", dsgd(captured=True, layers="all", method="polynomial"), None, 2.0),
    ("q = 2, all layers, full SVD", dsgd(layers="all", method="svd"), None, None),
    ("q = 1, greedy", dsgd(q=1), 1, 1.1),
    ("q = inf, greedy", dsgd(q=math.inf), 1, 1.1),
    ("q = 1, all layers", dsgd(q=1, layers="all"), None, None),
    ("q = inf, all layers", dsgd(q=math.inf, layers="all"), None, None),
    ("torch.optim.Muon", muon, None, None),
]


def time_together(steps: dict[str, Callable], repeats: int = REPEATS, each: int = STEPS) -> dict[str, list[float]]:
    """Seconds a step of every function, ``repeats`` times each in turn, ``each`` steps a turn, after a warm-up."""
    seconds = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(each):
                step()
            if turn > 1:
                seconds[name].append((time.perf_counter() - began) / each)
    return seconds


def measure(repeats: int = REPEATS) -> list[dict]:
    """All variants on one thread, and on all that torch has if there are more."""
    threads = torch.get_num_threads()
    try:
        return [row for count in sorted({1, threads}) for row in _measure(count, repeats)]
    finally:
        torch.set_num_threads(threads)


def _measure(threads: int, repeats: int) -> list[dict]:
    torch.set_num_threads(threads)
    inputs, targets, data = images(BATCH)
    steps = {"SGD": training_step(sgd, inputs, targets)}
    for name, make, winner, _ in VARIANTS:
        steps[name] = training_step(make, inputs, targets)
        layer = getattr(steps[name](), "last_layer", None)
        if winner is not None and int(layer) != winner:
            raise AssertionError(f"{name}: layer {winner + 1} was to win, but layer {int(layer) + 1} did")
    load = os.getloadavg()[0]
    seconds = time_together(steps, repeats)
    rows = []
    for name, _, _, multiple in VARIANTS:
        ratios = [base / own for base, own in zip(seconds["SGD"], seconds[name], strict=True)]
        ours = name if "Muon" in name else f"DSGD, {name}"
        rows.append(
            {
                "name": f"SGD step over step of {ours} ({threads} thread{'s' * (threads > 1)})",
                "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
                "at_least": 0.0 if multiple is None else 1 / multiple,
                "seconds": {"ours": statistics.median(seconds[name]), "SGD": statistics.median(seconds["SGD"])},
                "peers": "a training step with torch.optim.SGD",
                "settings": {
                    "sizes": SIZES,
                    "batch": BATCH,
                    "data": data,
                    "repeats": repeats,
                    "steps a repeat": STEPS,
                    "threads": threads,
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
                    "load before": load,
                    "torch": str(torch.__version__),
                },
            }
        )
    return rows


if __name__ == "__main__":
    for row in measure():
        print(f"{1 / row['ratio']['median']:6.2f} SGD steps ({1e3 * row['seconds']['ours']:.2f} ms)  {row['name']}")

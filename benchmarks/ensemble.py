"""How much faster is an ensemble than a loop over ordinary PyTorch runs? Prints JSON.

Both sides do the same work in one process, in turn, many times: forward, loss, backward and a step of gradient
descent on the same batches. The loop is the one a person would write: `nn.Linear` layers, `torch.optim.SGD`, one run
after the other. Its runs are independent and equally long, so a part of them is timed and scaled up. The ensemble
goes through `lib.training.train`, with all it does: records, divergence checks, chunks under a memory bound. Building
the networks is left out on both sides.
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from lib.ensemble import Ensemble
from lib.networks import mlp
from lib.optimizers import SGD
from lib.training import Batches, train


def _plain(network: nn.Sequential) -> nn.Sequential:
    """The same network of ordinary layers."""
    layers = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features)
            plain.load_state_dict(layer.state_dict())
            layer = plain
        layers.append(layer)
    return nn.Sequential(*layers)


def _loop(networks, rates, loss, batches, steps) -> float:
    start = time.perf_counter()
    for network, rate in zip(networks, rates.tolist(), strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        for _, inputs, targets in batches.walk([0], 0, steps - 1):
            optimizer.zero_grad()
            loss(network(inputs), targets).backward()
            optimizer.step()
    return time.perf_counter() - start


def _ensemble(ensemble, rates, loss, batches, steps, max_memory) -> float:
    start = time.perf_counter()
    train(
        ensemble,
        lambda part: SGD(part.parameters(), lr=rates[part.runs]),
        loss,
        batches,
        steps,
        record_every=steps,
        max_memory=max_memory,
        progress=False,
    )
    return time.perf_counter() - start


def compare(name, sizes, loss, *, runs, batch, steps, at_least, max_memory=None, looped, repeats=5) -> dict:
    """The ratio of the loop's time to the ensemble's, for one sweep of step sizes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20 * batch, sizes[0], generator=generator)
    targets = (
        torch.randn(20 * batch, 1, generator=generator)
        if sizes[-1] == 1
        else torch.randint(sizes[-1], (20 * batch,), generator=generator)
    )
    batches = Batches(inputs, targets, batch)
    rates = torch.logspace(-4, -2, runs)
    ratios, loops, ensembles = [], [], []
    for repeat in range(repeats + 1):
        networks = [mlp(sizes, generator) for _ in range(runs)]
        ensemble = Ensemble(networks)
        plain = [_plain(network) for network in networks[:looped]]
        loop = _loop(plain, rates[:looped], loss, batches, steps) * runs / looped
        together = _ensemble(ensemble, rates, loss, batches, steps, max_memory)
        if repeat > 0:  # the first is the warm-up
            loops.append(loop)
            ensembles.append(together)
            ratios.append(loop / together)
    return {
        "name": name,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "at_least": at_least,
        "seconds": {"loop": statistics.median(loops), "ensemble": statistics.median(ensembles)},
        "peers": f"{runs} runs in a loop with nn.Linear and torch.optim.SGD ({looped} timed)",
        "settings": {
            "runs": runs,
            "batch": batch,
            "steps": steps,
            "max_memory": max_memory,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        },
    }


def measure() -> list[dict]:
    """Both sweeps of the design's table."""
    return [
        compare(
            "200-run sweep of the 13-10-10-10-1 network",
            (13, 10, 10, 10, 1),
            F.mse_loss,
            runs=200,
            batch=50,
            steps=200,
            at_least=15.0,
            looped=10,
        ),
        compare(
            "sweep of the 784-300-300-10 network",
            (784, 300, 300, 10),
            F.cross_entropy,
            runs=24,
            batch=100,
            steps=30,
            at_least=1.0,
            max_memory=100_000_000,
            looped=24,
        ),
    ]


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))

"""Sweeps of the 13-10-10-10-1 network of chapter 4 against loops over ordinary PyTorch runs. Prints JSON.

Both sides take exactly the same steps, and their weights are compared before any ratio is reported. A loop is what a
person would write: an `nn.Sequential` of `nn.Linear` and `nn.Sigmoid` layers, one run after the other, the objective
(16) as it stands, optimizers of `torch.optim`, gradients of the active layer alone where only one moves. Its runs are
independent and equally long, so a part of them is timed and scaled up. Both sides have the objective at every update;
ours counts its increases and sees which run diverges. Building the networks is left out on both sides.
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from lib.backpropagation import LOGISTIC
from lib.block_training import by_rate, train_blocks, train_full
from lib.losses import Squared
from lib.networks import feedforward
from lib.schedules import InverseSquareRoot
from lib.surrogates import FirstOrder

WIDTHS, SAMPLES, RIDGE = (13, 10, 10, 10, 1), 252, 1e-4


def _plain(network: nn.Sequential) -> nn.Sequential:
    """The same network of ordinary layers."""
    plain = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            copy = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=layer.weight.dtype)
            copy.load_state_dict(layer.state_dict())
            layer = copy
        plain.append(layer)
    return nn.Sequential(*plain)


def _objective(network, weights, X, Y):
    return F.mse_loss(network(X), Y) + RIDGE * sum(W.square().sum() for W in weights)


def _block_loop(networks, gammas, X, Y, steps):
    """Algorithm 1 with the surrogate (9) and steps 0.9 / sqrt(k), run by run."""
    alphas = InverseSquareRoot(0.9).first(steps).tolist()
    for network, gamma in zip(networks, gammas.tolist(), strict=True):
        weights = list(network.parameters())
        optimizers = [torch.optim.SGD([W], lr=1.0) for W in weights]
        for k, alpha in enumerate(alphas):
            active = k % len(weights)
            for j, W in enumerate(weights):
                W.requires_grad_(j == active)
            optimizer = optimizers[active]
            optimizer.param_groups[0]["lr"] = alpha / gamma
            optimizer.zero_grad()
            _objective(network, weights, X, Y).backward()
            optimizer.step()


def _full_loop(networks, rates, X, Y, steps):
    """Back-propagation with AdaGrad, run by run."""
    for network, rate in zip(networks, rates.tolist(), strict=True):
        weights = list(network.parameters())
        optimizer = torch.optim.Adagrad(weights, lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            _objective(network, weights, X, Y).backward()
            optimizer.step()


def _blocks(weights, gammas, X, Y, steps):
    schedule = InverseSquareRoot(0.9)
    network = {"loss": Squared(), "activation": LOGISTIC, "ridge": RIDGE}
    runs = {"surrogate": FirstOrder(gammas), "schedule": schedule, "steps": steps, "record_at": [0, steps]}
    return train_blocks(weights, X.mT, Y.mT, **runs, **network)


def _full(weights, rates, X, Y, steps):
    network = {"loss": Squared(), "activation": LOGISTIC, "ridge": RIDGE}
    rule = by_rate(torch.optim.Adagrad)
    runs = {"optimizer": rule, "rates": rates, "steps": steps, "record_at": [0, steps]}
    return train_full(weights, X.mT, Y.mT, **runs, **network)


def compare(
    name, loop, ours, settings, *, dtype, at_least, tolerance, compared=400, runs=200, looped=10, steps=400, repeats=5
) -> dict:
    """The ratio of the loop's time to ours for one sweep, ``settings`` ``(runs,)`` being what differs between runs."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(SAMPLES, WIDTHS[0], generator=generator).to(dtype)
    Y = (0.1 + 0.8 * torch.rand(SAMPLES, 1, generator=generator)).to(dtype)
    settings, every = settings.to(dtype), runs // looped
    ratios, loops, together = [], [], []
    for repeat in range(repeats + 1):
        networks = [feedforward(WIDTHS, generator, start="glorot").to(dtype) for _ in range(runs)]
        weights = [torch.stack(layers).detach() for layers in zip(*(n.parameters() for n in networks), strict=True)]
        plain = [_plain(network) for network in networks[::every]]
        count = steps if repeat > 0 else compared  # the first is the warm-up, and the one whose ends are compared
        began = time.perf_counter()
        loop(plain, settings[::every], X, Y, count)
        middle = time.perf_counter()
        history = ours(weights, settings, X, Y, count)
        seconds = (middle - began) * runs / looped, time.perf_counter() - middle
        if repeat == 0:
            ends = zip(history.weights, zip(*(p.parameters() for p in plain), strict=True), strict=True)
            for mine, theirs in ends:
                end = torch.stack(theirs).detach()
                torch.testing.assert_close(mine[::every], end, rtol=tolerance, atol=tolerance)
            continue
        loops.append(seconds[0])
        together.append(seconds[1])
        ratios.append(seconds[0] / seconds[1])
    return {
        "name": name,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "at_least": at_least,
        "seconds": {"loop": statistics.median(loops), "ours": statistics.median(together)},
        "peers": f"{runs} runs in a loop with nn.Linear and torch.optim ({looped} timed): {loop.__doc__}",
        "settings": {
            "runs": runs,
            "samples": SAMPLES,
            "steps": steps,
            "compared": f"weights after {compared} steps, to {tolerance:g}",
            "dtype": str(dtype),
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        },
    }


def measure() -> list[dict]:
    """Algorithm 1 in both precisions, and back-propagation with AdaGrad, its baseline."""
    gammas = torch.logspace(-2, 0, 200, dtype=torch.float64)
    rates = torch.tensor([0.01, 0.1]).repeat_interleave(100)
    name = "200-run sweep of Algorithm 1, 13-10-10-10-1"
    return [
        compare(f"{name}, float64", _block_loop, _blocks, gammas, dtype=torch.float64, at_least=15.0, tolerance=1e-9),
        compare(f"{name}, float32", _block_loop, _blocks, gammas, dtype=torch.float32, at_least=15.0, tolerance=1e-2),
        # AdaGrad divides by the size of the gradient, rounding and all: its runs are compared while they are short.
        compare(
            "200-run sweep of AdaGrad, 13-10-10-10-1",
            _full_loop,
            _full,
            rates,
            dtype=torch.float64,
            at_least=5.0,
            tolerance=1e-6,
            compared=10,
        ),
    ]


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))

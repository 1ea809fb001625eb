"""What a training step costs with ``DiminishingBatchNorm`` in place of torch's batch norm, side by side in one process.

The fully connected network is 784-300-300-10 with a batch of 100, the paper's; the convolutional one is ``conv_net`` on
images of 3 x 32 x 32. In both, normalization follows the activation of each hidden layer. A step is zero_grad, forward,
loss, backward and an AdaGrad update. ``python -m benchmarks.normalization``.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.dsgd import images, time_together
from lib import networks
from lib.normalization import DiminishingBatchNorm

BATCH, REPEATS = 100, 15
ALLOWED = 1.15  # multiple of a step with torch's batch norm


def fully_connected(normalization: Callable[[int], nn.Module]) -> nn.Module:
    return networks.mlp((784, 300, 300, 10), torch.Generator().manual_seed(0), normalization=normalization)


def convolutional(normalization: Callable[[int], nn.Module]) -> nn.Module:
    """Two convolutions of 16 and 32 channels and a layer of 64, with ``normalization`` of images or of vectors."""
    generator = torch.Generator().manual_seed(0)
    return networks.conv_net((3, 32, 32), (64,), generator, channels=(16, 32), normalization=normalization)


def torch_batch_norm(width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if width in (16, 32) else nn.BatchNorm1d(width)


def diminishing(width: int) -> nn.Module:
    return DiminishingBatchNorm(width, 0.1)


def training_step(network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adagrad(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()

    return step


def layer(module: nn.Module, inputs: torch.Tensor, upstream: torch.Tensor) -> Callable[[], None]:
    """Forward and backward pass of one layer."""

    def step() -> None:
        module(inputs.detach().requires_grad_()).backward(upstream)

    return step


def measure(repeats: int = REPEATS) -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pixels, targets, data = images(BATCH)
        labels = targets.argmax(1)
        generator = torch.Generator().manual_seed(1)
        colors = torch.randn(BATCH, 3, 32, 32, generator=generator)
        hidden, upstream = torch.randn(2, BATCH, 300, generator=generator)
        pairs = {
            "a training step of 784-300-300-10": (
                [training_step(fully_connected(make), pixels, labels) for make in (diminishing, torch_batch_norm)],
                8,
                1 / ALLOWED,
            ),
            "a training step of a convolutional network": (
                [training_step(convolutional(make), colors, labels) for make in (diminishing, torch_batch_norm)],
                2,
                1 / ALLOWED,
            ),
            "one layer alone, 300 features": (
                [layer(make(300), hidden, upstream) for make in (diminishing, torch_batch_norm)],
                100,
                0.0,
            ),
        }
        rows = []
        for name, ((ours, peer), each, need) in pairs.items():
            load = os.getloadavg()[0]
            seconds = time_together({"ours": ours, "torch": peer}, repeats, each)
            ratios = [base / own for base, own in zip(seconds["torch"], seconds["ours"], strict=True)]
            rows.append(
                {
                    "name": f"{name}: with nn.BatchNorm over with DiminishingBatchNorm (1 thread)",
                    "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
                    "at_least": need,
                    "seconds": {key: statistics.median(values) for key, values in seconds.items()},
                    "peers": "the same with nn.BatchNorm1d and nn.BatchNorm2d",
                    "settings": {
                        "batch": BATCH,
                        "data": data,
                        "repeats": repeats,
                        "steps a repeat": each,
                        "threads": 1,
                        "load before": load,
                        "torch": str(torch.__version__),
                    },
                }
            )
        return rows
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for row in measure():
        print(f"{1 / row['ratio']['median']:6.2f} ({1e3 * row['seconds']['ours']:.2f} ms)  {row['name']}")

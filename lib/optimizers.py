"""The papers' update rules as ordinary optimizers.

Each rule acts on the trailing dimensions of a parameter and treats leading ones as a batch, so that one optimizer
serves a single network and an ``Ensemble``; a setting that differs between the S runs is a tensor of shape ``(S,)``.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


def _check_rate(name: str, rate: Tensor | float) -> None:
    if isinstance(rate, Tensor):
        if rate.ndim != 1:
            raise ValueError(f"{name} must be a number or a tensor of shape (S,), got shape {tuple(rate.shape)}")
        # A meta tensor has no values to look at.
        bad = rate[:0] if rate.is_meta else rate[~((rate > 0) & rate.isfinite())]
        if len(bad):
            raise ValueError(f"{name} must be positive and finite in every run, got {bad.tolist()}")
    elif not 0 < rate < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {rate}")


class SGD(Optimizer):
    r"""Gradient descent, :math:`\theta_{k+1} = \theta_k - \eta\, g_k`, with one step size or one for every run.

    Args:
        params: parameters, or groups of them with an ``lr`` each (weights and batch-norm parameters, say).
        lr: step size :math:`\eta`: a number, or a tensor of shape ``(S,)`` for parameters of shape ``(S, ...)``.

    Raises:
        ValueError: if ``lr`` is not positive and finite, or does not fit the run axis of a parameter.
    """

    def __init__(self, params: Iterable, lr: Tensor | float):
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_rate("lr", group["lr"])
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].to(group["params"][0])
        for parameter in group["params"]:
            if isinstance(group["lr"], Tensor) and parameter.shape[:1] != group["lr"].shape:
                raise ValueError(
                    f"lr must have one entry for each run, got shape {tuple(group['lr'].shape)} "
                    f"for a parameter of shape {tuple(parameter.shape)}"
                )

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr = group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if isinstance(lr, Tensor):
                    rate = lr.view(-1, *[1] * (parameter.ndim - 1))
                    parameter.addcmul_(parameter.grad, rate, value=-1)
                else:
                    parameter.add_(parameter.grad, alpha=-lr)

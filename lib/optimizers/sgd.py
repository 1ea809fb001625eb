"""Gradient descent with a step size for each run."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lib.optimizers.rates import check_rate


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
        check_rate("lr", group["lr"])
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
            self._step_plainly(group)

    def _step_plainly(self, group: dict) -> None:
        lr = group["lr"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if isinstance(lr, Tensor):
                rate = lr.view(-1, *[1] * (parameter.ndim - 1))
                parameter.addcmul_(parameter.grad, rate, value=-1)
            else:
                parameter.add_(parameter.grad, alpha=-lr)

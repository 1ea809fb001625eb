"""Blocks of parameters that are measured and rescaled as one vector.

A parameter group says in ``"blocks"`` what its blocks are:

- ``"rows"``: every slice along the first axis of every parameter, the row of a matrix or the filter of a kernel;
- ``"joint"``: all parameters of the group together;
- a number k: the first axis of every parameter, cut into k equal pieces; piece j of all parameters is one block;
- ``None``: it has none, and is trained by plain gradient descent.

``"stacked"`` says whether the parameters have a leading run axis S. A value for each block has the shape ``(k,)``, or
``(S, k)`` if stacked.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lib.optimizers.rates import check_rate
from lib.optimizers.sgd import SGD


class Unit(NamedTuple):
    """Parameters that are cut alike: piece j of each of them, together, is block j.

    ``count`` is the number of blocks k, ``stacked`` whether there is a leading run axis.
    """

    parameters: tuple[Tensor, ...]
    count: int
    stacked: bool

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """The squared norm of every block of ``tensors``, which are shaped as the parameters: ``(..., k)``."""
        runs = self.parameters[0].shape[:1] if self.stacked else ()
        return sum(tensor.reshape(*runs, self.count, -1).square().sum(-1) for tensor in tensors)

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """``values``, ``(..., k)``, shaped so that they multiply ``like`` block by block."""
        axis = int(self.stacked)
        if self.count > 1 and like.shape[axis] != self.count:
            values = values.repeat_interleave(like.shape[axis] // self.count, -1)
        return values.view(*values.shape[: like.ndim], *[1] * (like.ndim - values.ndim)) if like.ndim else values[0]

    def scale(self, factors: Tensor) -> None:
        """Multiply every block by its factor ``(..., k)``, in place."""
        for parameter in self.parameters:
            parameter.mul_(self.spread(factors, parameter))

    def normalize(self) -> None:
        """Divide every block by its norm, in place; one without length stays."""
        norms = self.squares(self.parameters).sqrt()
        self.scale(ratio(torch.ones_like(norms), norms))


def cut(parameters: Sequence[Tensor], blocks: str | int, stacked: bool) -> list[Unit]:
    """The units of a group.

    Raises:
        ValueError: if ``blocks`` is unknown, or does not divide the first axis of a parameter.
    """
    if blocks == "rows":
        axis = int(stacked)
        for parameter in parameters:
            if parameter.ndim <= axis:
                raise ValueError(f"blocks 'rows' needs parameters with rows, got shape {tuple(parameter.shape)}")
        return [Unit((parameter,), parameter.shape[axis], stacked) for parameter in parameters]
    if blocks == "joint":
        return [Unit(tuple(parameters), 1, stacked)]
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise ValueError(f"blocks must be 'rows', 'joint', a positive number of pieces or None, got {blocks!r}")
    for parameter in parameters:
        if parameter.ndim <= stacked or parameter.shape[int(stacked)] % blocks:
            raise ValueError(f"blocks must divide the rows of shape {tuple(parameter.shape)}, got {blocks}")
    return [Unit(tuple(parameters), blocks, stacked)]


class BlockSGD(SGD):
    """Gradient descent on groups with blocks: what the optimizers on blocks share."""

    def __init__(self, params, defaults: dict):
        torch.optim.Optimizer.__init__(self, params, {"stacked": False, **defaults})

    def add_param_group(self, param_group: dict) -> None:
        if "lr" not in param_group and self.defaults["lr"] is None:
            raise ValueError("lr must be given, as an argument or in every group")
        if "blocks" not in param_group and "blocks" not in self.defaults:
            raise ValueError(
                "params must be groups with blocks, such as scale_invariant_groups(...).parameter_groups(...)"
            )
        super().add_param_group(dict(param_group))  # the caller's stays without the defaults of this optimizer
        group = self.param_groups[-1]
        group["stacked"] = group["stacked"] or isinstance(group["lr"], Tensor)
        if group["blocks"] is not None:
            cut(group["params"], group["blocks"], group["stacked"])

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if group["blocks"] is None:
                self._step_plainly(group)
                continue
            lr = self._rate(group)
            for unit in self._units(group):
                self._update(group, unit, lr)

    def _update(self, group: dict, unit: Unit, lr: Tensor | float) -> None:
        """One step of the blocks of ``unit``, at the rate ``lr`` of their group."""
        raise NotImplementedError

    def _units(self, group: dict) -> Iterator[Unit]:
        """The units of a group all of whose parameters have a gradient."""
        if group["blocks"] is not None:
            for unit in cut(group["params"], group["blocks"], group["stacked"]):
                if all(parameter.grad is not None for parameter in unit.parameters):
                    yield unit

    def _rate(self, group: dict, name: str = "lr") -> Tensor | float:
        """A setting of the group that multiplies a value for each block."""
        value = group[name]
        return value[:, None] if isinstance(value, Tensor) else value

    def _check_start(self, name: str) -> None:
        """Check a positive setting of the newest group, a number or one for each run."""
        group = self.param_groups[-1]
        value = group[name]
        if value is None:
            return
        check_rate(name, value)
        if isinstance(value, Tensor):
            group[name] = value = value.to(group["params"][0])
            if not group["stacked"] or group["params"][0].shape[:1] != value.shape:
                raise ValueError(
                    f"{name} must have one entry for each run, got shape {tuple(value.shape)} "
                    f"for a parameter of shape {tuple(group['params'][0].shape)}"
                )


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient of norms; a block without length keeps it."""
    return numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)

"""What the layer-wise optimizers share: parameters seen as matrices, their gradients, and steps along duality maps."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from lib import duality, polar
from lib.factors import Factors
from lib.optimizers.rates import check_rate

# How many trailing axes of a parameter make its matrix.
LAYOUTS = {"matrix": 2, "vector": 1, "kernel": 4}
THIN = 64  # up to this short side an eigendecomposition on a CPU costs less than anything clever
BASIS = 8  # columns of the basis that bounds a nuclear norm


def as_matrix(tensor: Tensor, layout: str) -> Tensor:
    """A parameter as ``(..., n_out, n_in)``: a bias is a column, a kernel ``(out, in, k, k)`` has n_in = in k k."""
    if layout == "vector":
        return tensor.unsqueeze(-1)
    return tensor.flatten(-3) if layout == "kernel" else tensor


class Layer:
    """One parameter in one step: its gradient as a matrix or by factors, its norms, and its move."""

    def __init__(self, parameter: Tensor, group: dict, state: dict, q: float, method: str, factors: Factors | None):
        self.parameter, self.group, self.state, self.q, self.method = parameter, group, state, q, method
        self.pair = factors.of(parameter) if factors is not None and parameter in factors else None
        gradient = parameter.grad
        if self.pair is not None and (q != 2 or min(parameter.shape[-2:]) <= self.pair[0].shape[-2]):
            gradient, self.pair = self.pair[0].mT @ self.pair[1], None  # the factors are no smaller than g
        self.gradient = None if gradient is None else as_matrix(gradient, group["layout"])
        self.empty = self.gradient is None and self.pair is None
        self._direction: polar.Polar | None = None
        self._entries: tuple[int, Tensor, Tensor] | None = None

    def norm(self) -> Tensor:
        """The dual norm of the gradient, ``(...,)``; for "polynomial" the part of it that the map attains."""
        if self.empty:
            return self.parameter.new_zeros(self.parameter.shape[: self.parameter.ndim - LAYOUTS[self.group["layout"]]])
        return self._polar().norm if self.q == 2 else self._extremes()[2].abs().sum((-2, -1))

    def _extremes(self) -> tuple[int, Tensor, Tensor]:
        if self._entries is None:
            self._entries = duality.extremes(self.gradient, self.q)
        return self._entries

    def _polar(self) -> polar.Polar:
        if self._direction is None:
            if self.pair is not None:
                by = polar.factored_polynomial if self.method == "polynomial" else polar.factored_gram
                self._direction = by(*self.pair)
            else:
                g = self.gradient
                thin = g.device.type == "cpu" and min(g.shape[-2:]) <= THIN
                method = "gram" if thin and self.method == "polynomial" else self.method
                self._direction = getattr(polar, method)(g)
        return self._direction

    def move(self, scale: Tensor | float) -> None:
        """Subtract ``scale`` times the unit of the gradient; ``scale`` is a number or ``(...,)``."""
        if self.empty:
            return
        scale = scale[..., None, None] if isinstance(scale, Tensor) else scale
        # A kernel may be stored with its channels last, and is then no view as a matrix.
        view = as_matrix(self.parameter, self.group["layout"]) if self.group["layout"] != "kernel" else None
        if self.q != 2:
            axis, index, values = self._extremes()
            change = (values < 0).to(values.dtype) * (2 * scale) - scale  # sgn(0) = 1
            if view is not None:
                view.scatter_add_(axis, index, change)
                return
            change = torch.zeros_like(self.gradient).scatter_(axis, index, change)
        else:
            _, left, right = self._polar()
            left = left * -scale
            if view is not None and view.ndim == 2:
                view.addmm_(left, right)
                return
            if view is not None and right.ndim == 3:
                view.baddbmm_(left, right)
                return
            change = left @ right
        self.parameter.add_(change.view(self.parameter.shape))

    # -- Bounds of the dual norm as plain numbers, for one network on a CPU --------------------------------------------

    def interval(self) -> Iterator[tuple[float, float]]:
        """Intervals that hold the dual norm, each smaller and dearer than the one before; the last is a point."""
        if self.q == 2 and not self.empty and self.method != "svd":
            if self.pair is not None:
                yield 0.0, 1.0001 * polar.factored_bound(*self.pair).item()
            elif min(self.gradient.shape[-2:]) > THIN:
                g, count = self.gradient, min(self.gradient.shape[-2:])
                frobenius = torch.linalg.vector_norm(g)
                low = 0.9999 * frobenius.item()
                yield low, 1.0001 * math.sqrt(count) * frobenius.item()
                for _ in range(4):
                    bound, part = polar.deflated_bound(g, self._basis(), frobenius)
                    yield low, 1.0001 * bound.item()
                    self.state["basis"] = torch.linalg.qr(g @ part.mT).Q
        large = self.q != 2 and not self.empty and self.gradient.numel() >= 2**15
        if large and self.q == 1:
            # The largest entry of a column is at most its length, and at least that over the root of n_out.
            rows, columns = self.gradient.shape[-2:]
            frobenius = torch.linalg.vector_norm(self.gradient).item()
            yield 0.9999 * frobenius / math.sqrt(rows), 1.0001 * frobenius * math.sqrt(columns)
        norm = (duality._dual_norm(self.gradient, self.q) if large else self.norm()).item()
        yield norm, norm

    def _basis(self) -> Tensor:
        """Of the last step; at first, of the sums of eight stretches of columns."""
        if "basis" not in self.state:
            columns = torch.stack([part.sum(-1) for part in self.gradient.tensor_split(BASIS, -1)], -1)
            self.state["basis"] = torch.linalg.qr(columns).Q
        return self.state["basis"]


class Layerwise(Optimizer):
    """Layers are parameters seen as matrices, in order over all groups; one of them, or all, move in a step."""

    def __init__(
        self,
        params: Iterable,
        defaults: dict,
        *,
        q: float,
        layers: str,
        allowed: tuple[str, ...],
        method: str | None,
        factors: Factors | None,
        seed: Tensor | int,
    ):
        duality.check_q(q)
        if layers not in allowed:
            raise ValueError(f"layers must be one of {', '.join(allowed)}, got {layers!r}")
        if method is not None and method not in polar.METHODS:
            raise ValueError(f"method must be one of {', '.join(polar.METHODS)}, got {method!r}")
        if factors is not None and method == "svd":
            raise ValueError("method 'svd' needs the gradient itself: use 'gram' or 'polynomial' with factors")
        self.q, self.layers, self.method, self.factors, self.seed = q, layers, method, factors, seed
        self.last_layer: Tensor | None = None
        super().__init__(params, {"layout": "matrix", **defaults})
        if isinstance(seed, Tensor) and seed.shape != self._runs():
            raise ValueError(f"seed must have one entry for each run, {tuple(self._runs())}, got {tuple(seed.shape)}")

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_rate("lr", group["lr"])
        if group["layout"] not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {group['layout']!r}")
        axes = LAYOUTS[group["layout"]]
        for parameter in group["params"]:
            runs = parameter.shape[: max(0, parameter.ndim - axes)]
            if parameter.ndim - axes not in (0, 1) or runs != self._runs():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} does not fit layout {group['layout']!r} and run axis "
                    f"{tuple(self._runs())}: put biases and convolutions in groups of their own, with layout 'vector' "
                    "and 'kernel'"
                )
            if isinstance(group["lr"], Tensor) and group["lr"].shape != runs:
                raise ValueError(
                    f"lr must have one entry for each run, got shape {tuple(group['lr'].shape)} "
                    f"for a parameter of shape {tuple(parameter.shape)}"
                )
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].to(group["params"][0])

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.factors is not None:
            self.factors.clear()

    def _runs(self) -> torch.Size:
        first = self.param_groups[0]
        parameter = first["params"][0]
        return parameter.shape[: max(0, parameter.ndim - LAYOUTS[first["layout"]])]

    def _on_host(self) -> bool:
        """One network on a CPU: its numbers may be read, and decide."""
        first = self.param_groups[0]["params"][0]
        return first.device.type == "cpu" and not self._runs()

    def _layers(self) -> list[Layer]:
        found = []
        for group in self.param_groups:
            for parameter in group["params"]:
                method = self.method or ("svd" if parameter.dtype == torch.float64 and self.factors is None else "gram")
                found.append(Layer(parameter, group, self.state[parameter], self.q, method, self.factors))
        return found

    def _turn(self, count: int) -> Tensor | None:
        """The layer that moves by rule, ``(S,)`` or ``()``; None if all do. Counts the steps."""
        first = self.param_groups[0]["params"][0]
        step = self.state[first].get("step", 0)
        self.state[first]["step"] = step + 1
        if self.layers == "sequential":
            return torch.full(self._runs(), step % count, device=first.device)
        if self.layers == "random":
            seeds = self.seed.to(first.device) if isinstance(self.seed, Tensor) else self.seed
            return random_layer(torch.zeros(self._runs(), dtype=torch.int64, device=first.device) + seeds, step, count)
        return None


def random_layer(seeds: Tensor, step: int, count: int) -> Tensor:
    """A layer for each seed, by counting (splitmix64): made on the device, and nothing to save but the step."""
    x = seeds + step * 0x9E3779B97F4A7C15 % 2**63
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return ((x ^ ((x >> 31) & (2**33 - 1))) & (2**62 - 1)) % count

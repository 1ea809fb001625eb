"""Duality structure gradient descent, and descent in a fixed norm layer by layer."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lib import duality, polar
from lib.duality import LOGISTIC, Activation
from lib.factors import Factors
from lib.optimizers.layerwise import Layer, Layerwise

LAYERS = ("greedy", "all", "sequential", "random")


class DSGD(Layerwise):
    r"""Duality structure gradient descent (Algorithm 4.1): the layer with the largest certified decrease moves.

    With :math:`g_i` the gradient of layer i and :math:`p_i` its layer polynomial (Proposition 4.3),

    .. math:: i^* = \arg\max_i \frac{\|g_i\|_{q*}}{p_i(w)}, \qquad
              w_{i^*} \leftarrow w_{i^*} - \frac{\epsilon}{p_{i^*}(w)^2}\, \rho_q(g_{i^*}).

    With the full gradient of the mean squared error (21) of a network without biases, :math:`\epsilon = 1` lowers it by
    at least :math:`\|g_{i^*}\|_{q*}^2 / 2 p_{i^*}^2`: there is nothing to tune. Drop-in use::

        network = lib.networks.feedforward((784, 300, 10), torch.Generator())
        optimizer = DSGD(network.parameters())
        loss = (network(x) - targets).square().sum(-1).mean()

    The certificate needs K weight matrices in order, one activation with :math:`|\sigma| \le 1` after *every* layer, inputs and
    targets in [-1, 1]. Parameters outside the theory (biases, convolutions, layers with other activations) have none: they
    go in groups with a number that you vouch for, ``squares``, a bound :math:`p^2` on the Hessian in each of them, and with
    ``layout`` "vector" or "kernel" if they are not matrices. Without it they are refused::

        DSGD([{"params": kernels, "layout": "kernel", "squares": 100.0},
              {"params": biases, "layout": "vector", "squares": 4.0}])

    For q = 2 ``method`` says how the duality map is found: "svd" (the default in float64), "gram" (the default otherwise: a
    float64 eigendecomposition of the short side) or "polynomial" (matrix products only; a certified inexact map whose
    :math:`\langle g, m \rangle` replaces the norm). For one network on a CPU the greedy choice is settled by bounds, so that
    mostly only the layer that moves is factorized. With ``factors`` the map comes from the factors of back-propagation.
    On a GPU "svd" and "gram", which call ``svd`` and ``eigh``, may wait for the device, and so does ``eigvalsh`` for the
    spectral norms in :math:`p_i`; a step with q = 1 or inf never does.

    Attributes:
        last_layer: which layer the last step moved in each run, counted over all groups, ``(S,)`` or ``()``;
            None before the first step and for ``layers="all"``.
        last_squares: the :math:`p_i^2` of the last step, ``(S, K)`` or ``(K,)``.

    Args:
        params: the K weight matrices ``(n_i, n_{i-1})`` in order, or ``(S, n_i, n_{i-1})`` for an ensemble; or groups.
        lr: step size :math:`\epsilon`: a number, or a tensor of shape ``(S,)``.
        q: 1, 2 or ``math.inf``: the norm of the layers.
        layers: "greedy"; "all" (DSGD_ALL, which has no theorem); "sequential" or "random" (one layer a step).
        activation: bounds on :math:`\sigma', \sigma''`.
        residual: as for ``duality.layer_polynomials``.
        method: for q = 2, how the duality map is found.
        factors: the captured factors of the network (``lib.factors.Factors``), in place of ``.grad``.
        seed: for "random": a number, or a tensor ``(S,)`` with one for each run.

    Raises:
        ValueError: for an unknown q, layers or layout, a step size that is not positive and finite or does not fit the runs,
            matrices that are not the layers of one network.

    Source: Flynn, Algorithm 4.1; DSGD_ALL: Section 5.2; RANDOM and SEQUENTIAL: Section 5.1.
    """

    def __init__(
        self,
        params: Iterable,
        lr: Tensor | float = 1.0,
        *,
        q: float = 2,
        layers: str = "greedy",
        activation: Activation = LOGISTIC,
        residual: float = 2.0,
        method: str | None = None,
        factors: Factors | None = None,
        seed: Tensor | int = 0,
    ):
        self.activation, self.residual = activation, residual
        self.last_squares: Tensor | None = None
        super().__init__(
            params,
            {"lr": lr, "squares": None},
            q=q,
            layers=layers,
            allowed=LAYERS,
            method=method,
            factors=factors,
            seed=seed,
        )

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["squares"] is None:
            if sum(other["squares"] is None for other in self.param_groups) > 1:
                raise ValueError("the layers of the network must be one group; give others their squares")
            if group["layout"] != "matrix":
                raise ValueError(
                    f"layer polynomials are for layout 'matrix'; give layout {group['layout']!r} its squares"
                )
            duality.check_chain(group["params"])
        elif not 0 < group["squares"] < math.inf:
            raise ValueError(f"squares must be positive and finite, got {group['squares']}")

    def _squares(self, input_scales: Tensor | None) -> list[Tensor | float]:
        """p_i^2 of every layer, as numbers for one network on a CPU, else as numbers or tensors ``(...,)``."""
        squares = []
        for group in self.param_groups:
            weights = group["params"]
            if group["squares"] is not None:
                squares += [float(group["squares"])] * len(weights)
                continue
            norms = [polar.spectral_norm(w) if self.q == 2 else duality._matrix_norm(w, self.q) for w in weights[1:]]
            scales = None if input_scales is None else input_scales.unbind(-1)
            if self._on_host():
                norms = [norm.item() for norm in norms]
                scales = None if scales is None else [scale.item() for scale in scales]
            widths = [*(w.shape[-1] for w in weights), weights[-1].shape[-2]]
            squares += duality.squares_of_norms(norms, widths, self.q, self.activation, scales, self.residual)
        return squares

    @torch.no_grad()
    def step(self, *, input_scales: Tensor | None = None) -> None:
        """Move one layer (or all) of every run.

        Args:
            input_scales: as for ``duality.layer_polynomials``, at the present weights.
        """
        layers, squares = self._layers(), self._squares(input_scales)
        chosen = self._turn(len(layers))
        like = self.param_groups[0]["params"][0]
        if self._on_host():
            self.last_squares = torch.tensor(squares, dtype=like.dtype)
            if self.layers == "greedy":
                chosen = torch.tensor(_largest(layers, [1 / math.sqrt(square) for square in squares]))
            moving = range(len(layers)) if chosen is None else [int(chosen)]
            self.last_layer = chosen
            for i in moving:
                layers[i].move(layers[i].norm().item() * layers[i].group["lr"] / squares[i])
            return
        self.last_squares = torch.stack([like.new_zeros(self._runs()) + square for square in squares], -1)
        norms = torch.stack([layer.norm() for layer in layers], -1)
        if self.layers == "greedy":
            chosen = (norms / self.last_squares.sqrt()).argmax(-1)
        self.last_layer = chosen
        scales = norms / self.last_squares
        for i, layer in enumerate(layers):
            scale = layer.group["lr"] * scales[..., i]
            layer.move(scale if chosen is None else torch.where(chosen == i, scale, 0.0))


def _largest(layers: list[Layer], weights: list[float]) -> int:
    """The first layer with the largest weighted dual norm; intervals are narrowed only as far as the choice needs."""
    searches = [layer.interval() for layer in layers]
    bounds = [next(search) for search in searches]
    while True:
        lost = [i for i, (low, high) in enumerate(bounds) if math.isnan(low + high)]
        if lost:
            return lost[0]  # its step is NaN, and shows that the run has diverged
        best = max(low * weight for (low, _), weight in zip(bounds, weights, strict=True))
        able = [i for i, ((_, high), weight) in enumerate(zip(bounds, weights, strict=True)) if high * weight >= best]
        wide = [i for i in able if bounds[i][0] < bounds[i][1]]
        if len(able) == 1 or not wide:
            return able[0]
        widest = max(wide, key=lambda i: (bounds[i][1] - bounds[i][0]) * weights[i])
        bounds[widest] = next(searches[widest])


class NormSGD(Layerwise):
    r"""Gradient descent in a fixed norm: :math:`w_i \leftarrow w_i - \eta\, \rho_q(g_i)` in every layer.

    With ``layers="sequential"`` or ``"random"`` one layer moves a step: the paper's SEQUENTIAL and RANDOM, whose step is tuned.

    Attributes:
        last_layer: which layer the last step moved in each run, ``(S,)`` or ``()``; None before the first step and for "all".

    Args:
        params: matrices ``(n_out, n_in)`` or ``(S, n_out, n_in)``; or groups, with ``layout`` as in ``DSGD``.
        lr: step size :math:`\eta`: a number, or a tensor of shape ``(S,)``.
        q: 1, 2 or ``math.inf``.
        layers: "all", "sequential" or "random".
        method: as for ``DSGD``.
        factors: as for ``DSGD``.
        seed: for "random": a number, or a tensor ``(S,)`` with one for each run.

    Raises:
        ValueError: as ``DSGD``.

    Source: Flynn, Section 5.2 (SGD with the 1-, 2- and inf-norm) and Section 5.1.
    """

    def __init__(
        self,
        params: Iterable,
        lr: Tensor | float,
        *,
        q: float = 2,
        layers: str = "all",
        method: str | None = None,
        factors: Factors | None = None,
        seed: Tensor | int = 0,
    ):
        super().__init__(
            params, {"lr": lr}, q=q, layers=layers, allowed=LAYERS[1:], method=method, factors=factors, seed=seed
        )

    @torch.no_grad()
    def step(self) -> None:
        """Move one layer (or all) of every run."""
        layers = self._layers()
        chosen = self.last_layer = self._turn(len(layers))
        moving = [int(chosen)] if chosen is not None and self._on_host() else range(len(layers))
        for i in moving:
            scale = layers[i].group["lr"] * layers[i].norm()
            layers[i].move(scale if chosen is None else torch.where(chosen == i, scale, 0.0))

"""S feedforward networks that change one layer at a time, and evaluate only what a change has made wrong.

Shapes: ``weights`` are J tensors ``(S, d_j, d_{j-1})``, ``X`` is ``(d_0, N)``, ``Y`` is ``(d_J, N)``. Layers count from 1.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib import backpropagation
from lib.block_problems import BlockProblem

# In place, and one pass over memory instead of three, where PyTorch has the operation.
_APPLY = {"logistic": torch.sigmoid_, "tanh": torch.tanh_}
_PULL_BACK = {
    "logistic": torch.ops.aten.sigmoid_backward.grad_input,
    "tanh": torch.ops.aten.tanh_backward.grad_input,
}


class BlockRuns:
    r"""S feedforward networks whose weights change one layer at a time.

    It remembers the outputs of the layers, and evaluates only those that a change has made wrong.

    Attributes:
        weights: the current :math:`W_1, \dots, W_J`. Change them by ``replace``, or in place and say ``changed``.

    Args:
        weights, X, Y, loss, activation, ridge: as in ``lib.backpropagation``. The weights are copied.

    Raises:
        ValueError: if shapes do not fit, or the loss is not made for these targets.
    """

    def __init__(self, weights: Sequence[Tensor], X: Tensor, Y: Tensor, loss, activation, ridge=0.0):
        backpropagation.check_widths(weights, X)
        if any(W.ndim != 3 or len(W) != len(weights[0]) for W in weights):
            shapes = [tuple(W.shape) for W in weights]
            raise ValueError(f"weights must be (S, d_j, d_(j-1)) with one S for all layers, got shapes {shapes}")
        loss.check_targets(Y)
        self.weights = [W.detach().clone(memory_format=torch.contiguous_format) for W in weights]
        self.loss, self.activations = loss, backpropagation.as_activations(activation, len(weights))
        self.ridge = [backpropagation.ridge_of(ridge, j, len(weights)) for j in range(1, len(weights) + 1)]
        self._space: list[Tensor] | None = None
        self.use(X, Y)
        self.changed()

    def __len__(self) -> int:
        return len(self.weights[0])

    @property
    def layers(self) -> int:
        """J."""
        return len(self.weights)

    def use(self, X: Tensor, Y: Tensor) -> None:
        """Go on with other samples: ``X`` ``(d_0, B)`` and ``Y`` ``(d_J, B)``, or with a leading run axis."""
        self.X, self.Y = X, Y
        if self._space is None or self._space[0].shape[-1] != X.shape[-1]:
            place = self.weights[0]
            sizes = [(len(W), W.shape[1], X.shape[-1]) for W in self.weights]
            self._space = [place.new_empty(size) for size in sizes]
            self._trial_space = [place.new_empty(size) for size in sizes]
            # Two places for the deltas of all layers, in turn: the less memory is touched, the more stays in the cache.
            flat = place.new_empty(2, max(math.prod(size) for size in sizes))
            self._delta_space = [flat[i % 2, : math.prod(size)].view(size) for i, size in enumerate(sizes)]
        self._Z = [X, *self._space]
        self._known = 0  # the outputs of so many layers are right
        self._trial: tuple[int, Tensor] | None = None

    def changed(self) -> None:
        """The weights have been changed in place: forget what was derived from them."""
        self._known, self._trial = 0, None
        self._penalties = torch.stack([self._penalty(j, W) for j, W in enumerate(self.weights, start=1)])

    def outputs(self, j: int) -> Tensor:
        """:math:`Z_j`, ``(S, d_j, N)``; :math:`Z_0` is X."""
        for i in range(self._known + 1, j + 1):
            self._layer(i, self.weights[i - 1], self._Z[i - 1], self._Z[i])
        self._known = max(self._known, j)
        return self._Z[j]

    def data_loss(self) -> Tensor:
        """The loss without the ridge terms, ``(S,)``."""
        return self.loss.value(self.outputs(self.layers), self.Y)

    def objective(self) -> Tensor:
        """f, ``(S,)``."""
        return self.data_loss() + self._penalties.sum(0)

    def gradient(self, j: int) -> Tensor:
        r""":math:`\nabla_j f` by (A.6) and (A.7), like :math:`W_j`."""
        return self._slope(j, self._delta(j))

    def gradients(self) -> list[Tensor]:
        """All :math:`\nabla_j f`, from one backward pass."""
        found, delta = [], None
        for j in range(self.layers, 0, -1):
            delta = self._delta(j, delta)
            found.insert(0, self._slope(j, delta))
        return found

    def hessian(self, j: int) -> Tensor:
        """The exact Hessian in block j, ``(S, n, n)``."""
        return backpropagation.block_hessian(
            self.weights[j - 1 :], 1, self.outputs(j - 1), self.Y, self.loss, self.activations[j - 1 :],
            self.ridge[j - 1 :],
        )  # fmt: skip

    def replace(self, j: int, V: Tensor) -> None:
        """Make :math:`W_j` be V, ``(S, d_j, d_{j-1})``."""
        if self._trial is not None and self._trial[0] == j and self._trial[1] is V:
            for i in range(j, self.layers + 1):  # what the trial has evaluated is now what is known
                self._space[i - 1], self._trial_space[i - 1] = self._trial_space[i - 1], self._space[i - 1]
            self._Z, self._known = [self.X, *self._space], self.layers
        else:
            self._known = min(self._known, j - 1)
        self._trial = None
        self.weights[j - 1] = V
        self._penalties[j - 1].copy_(self._penalty(j, V))

    def problem(self, j: int) -> BlockProblem:
        """Block j as a problem of its own, valid until the weights change. What is known at the current point is not
        computed twice."""
        W = self.weights[j - 1]
        known: dict[str, Tensor] = {}

        def once(name: str, compute: Callable[[], Tensor]) -> Tensor:
            if name not in known:
                known[name] = compute()
            return known[name]

        def value(V: Tensor) -> Tensor:
            if V is W:
                return once("value", self.objective)
            Z = self.outputs(j - 1)
            for i in range(j, self.layers + 1):
                Z = self._layer(i, V if i == j else self.weights[i - 1], Z, self._trial_space[i - 1])
            self._trial = (j, V)
            others = once("others", lambda: self._penalties.sum(0) - self._penalties[j - 1])
            return self.loss.value(Z, self.Y) + others + self._penalty(j, V)

        def elsewhere(V: Tensor):
            rest = [V, *self.weights[j:]]
            return rest, 1, self.outputs(j - 1), self.Y, self.loss, self.activations[j - 1 :], self.ridge[j - 1 :]

        def gradient(V: Tensor) -> Tensor:
            if V is W:
                return once("gradient", lambda: self.gradient(j))
            return backpropagation.block_gradient(*elsewhere(V))

        def hessian(V: Tensor) -> Tensor:
            if V is W:
                return once("hessian", lambda: self.hessian(j))
            return backpropagation.block_hessian(*elsewhere(V))

        return BlockProblem(value, gradient, hessian, broadcasts=False)

    def _layer(self, i: int, W: Tensor, Z: Tensor, out: Tensor) -> Tensor:
        if Z.ndim == 2:  # all runs see the same samples: one large product
            torch.mm(W.flatten(0, 1), Z, out=out.flatten(0, 1))
        else:
            torch.bmm(W, Z, out=out)
        sigma = self.activations[i - 1]
        return _APPLY[sigma.name](out) if sigma.name in _APPLY else out.copy_(sigma.value(out))

    def _delta(self, j: int, above: Tensor | None = None) -> Tensor:
        r""":math:`\Delta_j`, from :math:`\Delta_{j+1}` if that is given."""
        delta = above
        for i in range(self.layers if above is None else j, j - 1, -1):
            Z, space = self.outputs(self.layers) if i == self.layers else self._Z[i], self._delta_space[i - 1]
            if i == self.layers:
                pulled = self.loss.gradient(Z, self.Y)
            elif delta.shape[-2] == 1:
                pulled = torch.mul(self.weights[i].mT, delta, out=space)
            else:
                pulled = torch.bmm(self.weights[i].mT, delta, out=space)
            sigma = self.activations[i - 1]
            if sigma.name in _PULL_BACK:
                delta = _PULL_BACK[sigma.name](pulled, Z, grad_input=space)
            else:
                delta = torch.mul(pulled, sigma.slope_at_output(Z), out=space)
        return delta

    def _slope(self, j: int, delta: Tensor) -> Tensor:
        Z, W = self._Z[j - 1], self.weights[j - 1]
        G = (delta.flatten(0, 1) @ Z.mT).view_as(W) if Z.ndim == 2 else torch.bmm(delta, Z.mT)
        ridge = self.ridge[j - 1]
        if isinstance(ridge, Tensor) and ridge.ndim:
            return G.addcmul_(W, 2 * ridge[:, None, None])
        return G.add_(W, alpha=2 * ridge)

    def _penalty(self, j: int, V: Tensor) -> Tensor:
        entries = V.flatten(1)
        return torch.linalg.vecdot(entries, entries) * self.ridge[j - 1]

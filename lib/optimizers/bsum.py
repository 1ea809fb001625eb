r"""Block successive upper-bound minimization: Algorithm 1 of Ghauch et al. as an optimizer."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lib.majorization import backtrack
from lib.surrogates import Surrogate

RULES = ("cyclic", "random", "greedy")


class BSUM(Optimizer):
    r"""One block a step: minimize a surrogate of the objective in that block, and move towards its minimizer.

    .. math:: D_j = \arg\min_V g_j(V; W), \qquad W_j \leftarrow (1 - \alpha_k)\, W_j + \alpha_k D_j \quad (6), (7).

    A parameter is a block; a list of parameters, or a parameter group, is one block of them all. The closure returns
    the objective and must not call ``backward``::

        optimizer = BSUM(network.parameters(), FirstOrder(1.0), backtracking=True)
        optimizer.step(lambda: loss(network(inputs), targets))

    For an ``Ensemble`` the closure returns the ``(S,)`` losses, and the parameters have the run axis in front.

    Special cases (each is a test):

    - one block, ``FirstOrder(gamma)``: gradient descent with step :math:`\alpha/\gamma`, back-propagation (10), (11);
    - one parameter a block, ``FirstOrder(1.0)``: block-cyclic back-propagation;
    - ``SecondOrder(gamma)``, unit step: damped Newton (12); with the Gauss-Newton matrix as ``curvature``, the method
      of Levenberg and Marquardt;
    - ``Proximal(gamma)``: the proximal point method (14), block by block;
    - ``Linear(radius)``: the method of Frank and Wolfe;
    - ``SparseFirstOrder(gamma, weight)``: iterative soft thresholding (A.5), the L1 norm being added to the closure's value.

    ``state_dict`` holds the iteration and the constants found; surrogate and schedule are given anew.

    Reads from the device: with ``backtracking`` and ``trials=None``, after each trial; with ``Proximal``, as said there.

    Args:
        blocks: parameters, lists of parameters, or groups.
        surrogate: of ``lib.surrogates``. A group may have a ``surrogate`` of its own.
        schedule: from the iteration :math:`k = 1, 2, \dots` to :math:`\alpha_k`, a number or ``(S,)``: one of
            ``lib.schedules`` or any function. None is the unit step.
        rule: "cyclic" (:math:`j = ((k-1) \bmod J) + 1`); "random" (by lot, the same for all runs); "greedy" (the block whose
            surrogate promises the largest decrease :math:`f(W) - g_j(D_j)`, run by run: J times the work).
        backtracking: double :math:`\gamma_j`, run by run, from half its last value until :math:`f(D_j) \le g_j(D_j)`. The
            steps then never raise f, at the unit step.
        trials: how often at most; see ``surrogates.backtrack``.
        curvature: from the number of the block, from 1, to the matrix ``(..., n, n)`` that ``SecondOrder`` takes for the
            Hessian at the current point. None: the Hessian, by n backward passes.
        seed: of the random rule.

    Raises:
        ValueError: for an unknown rule, a surrogate that cannot be backtracked, or a closure whose value does not fit.
    """

    def __init__(
        self,
        blocks: Iterable,
        surrogate: Surrogate,
        *,
        schedule: Callable[[int], float | Tensor] | None = None,
        rule: str = "cyclic",
        backtracking: bool = False,
        trials: int | None = None,
        curvature: Callable[[int], Tensor] | None = None,
        seed: int = 0,
    ):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
            raise ValueError(f"trials must be a whole number, at least 1, or None, got {trials!r}")
        if isinstance(blocks, Tensor):
            raise ValueError("blocks must be parameters, lists of parameters or groups, got one tensor")
        self.surrogates: list[Surrogate] = []
        self._default = surrogate
        self.schedule, self.rule, self.backtracking, self.trials = schedule, rule, backtracking, trials
        self.curvature, self.seed = curvature, seed
        super().__init__([_as_group(block) for block in blocks], {"gamma": None, "iteration": 0})

    def add_param_group(self, param_group: dict) -> None:
        """Add a block."""
        param_group = dict(param_group)
        surrogate = param_group.pop("surrogate", self._default)
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if not isinstance(surrogate, Surrogate):
            raise ValueError(f"surrogate must be one of lib.surrogates, got {surrogate!r}")
        if self.backtracking and not hasattr(surrogate, "gamma"):
            raise ValueError(f"backtracking must be False for a surrogate without gamma, got {surrogate}")
        if getattr(surrogate, "project", None) is not None and len(params) != 1:
            raise ValueError(f"project must be None for a block of {len(params)} parameters: it projects one matrix")
        self.surrogates.append(surrogate.to(params[0]))

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Update one block.

        Args:
            closure: returns the objective, a scalar or ``(S,)``, and does not call ``backward``. It is evaluated several
                times, and must depend on nothing but the parameters.

        Returns:
            The objective before the step, without the L1 term of a ``SparseFirstOrder``.
        """
        k = self.param_groups[0]["iteration"] + 1
        for group in self.param_groups:
            group["iteration"] = k
        blocks = len(self.param_groups)
        if self.rule == "greedy":
            return self._greedy_step(closure, k)
        if self.rule == "cyclic":
            j = (k - 1) % blocks
        else:  # a function of seed and iteration, so that a resumed run draws the same blocks
            j = int(np.random.SeedSequence([self.seed, k]).generate_state(1)[0]) % blocks
        block = _Block(self.param_groups[j]["params"], closure, self._curvature_of(j))
        D, gamma = self._minimizer(j, block)
        self.param_groups[j]["gamma"] = gamma
        block.write(self._towards(block.W, D, k))
        return block.value(block.W)

    def _greedy_step(self, closure: Callable[[], Tensor], k: int) -> Tensor:
        found = []
        for j, group in enumerate(self.param_groups):
            block = _Block(group["params"], closure, self._curvature_of(j))
            D, gamma = self._minimizer(j, block)
            surrogate, f = self.surrogates[j], block.value(block.W)
            model = surrogate if gamma is None else surrogate.at(gamma)
            decrease = f + surrogate.penalty(block.W, f.ndim) - model.value(block, block.W, D)
            found.append((block, D, gamma, decrease))
        choice = torch.stack([decrease for *_, decrease in found]).argmax(0)
        for j, (block, D, gamma, _) in enumerate(found):
            chosen = choice == j
            mask = chosen.reshape(*chosen.shape, *[1] * (block.W.ndim - chosen.ndim))
            block.write(torch.where(mask, self._towards(block.W, D, k), block.W))
            if gamma is not None:
                old = self._last_gamma(j, block)
                self.param_groups[j]["gamma"] = torch.where(chosen, gamma, old)
        return found[0][0].value(found[0][0].W)

    def _minimizer(self, j: int, block: "_Block") -> tuple[Tensor, Tensor | None]:
        if not self.backtracking:
            return self.surrogates[j].minimizer(block, block.W), None
        found = backtrack(self.surrogates[j], block, block.W, self._last_gamma(j, block), self.trials)
        return found.D, found.gamma

    def _last_gamma(self, j: int, block: "_Block") -> Tensor:
        gamma = self.param_groups[j]["gamma"]
        f = block.value(block.W)
        return torch.as_tensor(self.surrogates[j].gamma if gamma is None else gamma).to(f).expand(f.shape)

    def _towards(self, W: Tensor, D: Tensor, k: int) -> Tensor:
        if self.schedule is None:
            return D
        alpha = self.schedule(k)
        if isinstance(alpha, Tensor):
            alpha = alpha.to(W).reshape(*alpha.shape, *[1] * (W.ndim - alpha.ndim))
        return torch.lerp(W, D, alpha)

    def _curvature_of(self, j: int) -> Callable[[], Tensor] | None:
        return None if self.curvature is None else lambda: self.curvature(j + 1)


class _Block:
    """The closure as a function of one block.

    ``W`` is the block at the start, ``(...)`` and its shape for one parameter, ``(..., n)`` for several; the parameters
    hold it whenever no method is running.
    """

    def __init__(self, params: list[Tensor], closure: Callable[[], Tensor], curvature: Callable[[], Tensor] | None):
        self.params, self.closure, self.curvature = params, closure, curvature
        with torch.enable_grad():
            f = closure()
            if not isinstance(f, Tensor) or f.ndim > 1:
                raise ValueError(f"closure must return a scalar or (S,) losses, got {f!r}")
            self.batch = f.shape
            bad = [tuple(p.shape) for p in params if p.shape[: f.ndim] != f.shape]
            if bad:
                raise ValueError(
                    f"parameters must have the run axis {tuple(f.shape)} of the losses in front, got {bad}"
                )
            gradient = self._slope(f)
        self.W = self._pack([p.detach() for p in params]).clone()
        self._f, self._gradient, self._hessian = f.detach(), gradient, None

    def value(self, V: Tensor) -> Tensor:
        if V is self.W:
            return self._f
        with torch.no_grad():
            return self._at(V, self.closure)

    def gradient(self, V: Tensor) -> Tensor:
        if V is self.W:
            return self._gradient
        with torch.enable_grad():
            return self._at(V, lambda: self._slope(self.closure()))

    def hessian(self, V: Tensor) -> Tensor:
        if V is self.W:
            if self._hessian is None:
                self._hessian = self._second_derivative()
            return self._hessian
        return self._at(V, self._second_derivative)

    def write(self, V: Tensor) -> None:
        """Make the parameters hold V."""
        with torch.no_grad():
            if len(self.params) == 1:
                self.params[0].copy_(V)
                return
            sizes = [p[(0,) * len(self.batch)].numel() for p in self.params]
            for p, part in zip(self.params, V.split(sizes, dim=-1), strict=True):
                p.copy_(part.reshape(p.shape))

    def _slope(self, f: Tensor) -> Tensor:
        return self._pack(torch.autograd.grad(f.sum(), self.params, allow_unused=True, materialize_grads=True))

    def _second_derivative(self) -> Tensor:
        if self.curvature is not None:
            return self.curvature()
        with torch.enable_grad():
            f = self.closure()
            g = torch.autograd.grad(f.sum(), self.params, create_graph=True)
            rows = []
            for entry in torch.cat([part.reshape(*self.batch, -1) for part in g], -1).unbind(-1):
                second = torch.autograd.grad(
                    entry.sum(), self.params, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                rows.append(torch.cat([part.reshape(*self.batch, -1) for part in second], -1))
            return torch.stack(rows, -2)

    def _at(self, V: Tensor, function: Callable[[], Tensor]) -> Tensor:
        self.write(V)
        try:
            return function().detach()
        finally:
            self.write(self.W)

    def _pack(self, parts) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.reshape(*self.batch, -1) for part in parts], -1)


def _as_group(block) -> dict:
    if isinstance(block, dict):
        return block
    return {"params": [block] if isinstance(block, Tensor) else list(block)}

r"""Algorithm 1 of Ghauch et al. on S feedforward networks at once, and the trainers it is compared with.

It is the optimizer ``BSUM`` for one architecture, made fast: see ``lib.block_runs``. A run's trajectory does not depend
on the others. Nothing is read from the device inside a step, except where a docstring says so.

Shapes: ``weights`` are J tensors ``(S, d_j, d_{j-1})``, ``X`` is ``(d_0, N)``, ``Y`` is ``(d_J, N)``; settings are
numbers, or tensors ``(S,)`` with one for each run. Layers and iterations count from 1.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lib import schedules
from lib.block_records import History, Recorder, record_points
from lib.block_runs import BlockRuns
from lib.majorization import Backtracked, backtrack, certified_lipschitz
from lib.schedules import Schedule
from lib.surrogates import FirstOrder, Surrogate

DRAWN_AT_ONCE = 64  # iterations whose batches are drawn together, on the CPU


@dataclass(frozen=True)
class Minibatches:
    """A new batch for every update, drawn without replacement, as a function of the seed and the iteration alone.

    Args:
        size: B, or a function from the iteration k = 1, 2, ... to B; never more than N are taken.
        seeds: one seed, and all runs see the same batches; or a seed for each run.
    """

    size: int | Callable[[int], int]
    seeds: int | Sequence[int] = 0

    def select(self, part: slice) -> "Minibatches":
        """The batches of the runs at ``part`` alone."""
        return self if isinstance(self.seeds, int) else Minibatches(self.size, tuple(self.seeds)[part])

    def walk(self, X: Tensor, Y: Tensor, steps: int):
        """The pair (X, Y) of every iteration: ``(d, B)``, or ``(S, d, B)`` with a seed for each run."""
        samples = X.shape[-1]
        seeds = [self.seeds] if isinstance(self.seeds, int) else list(self.seeds)
        distinct = sorted(set(seeds))
        generators = [torch.Generator().manual_seed(seed) for seed in distinct]
        which = torch.tensor([distinct.index(seed) for seed in seeds]).to(X.device)
        for k in range(1, steps + 1):
            turn = (k - 1) % DRAWN_AT_ONCE
            if turn == 0:
                count = min(DRAWN_AT_ONCE, steps + 1 - k)
                drawn = [[torch.randperm(samples, generator=g) for g in generators] for _ in range(count)]
                order = torch.stack([torch.stack(row) for row in drawn]).to(X.device)
            size = self.size(k) if callable(self.size) else self.size
            if size < 1:
                raise ValueError(f"size must be at least 1, got {size} in iteration {k}")
            if isinstance(self.seeds, int):
                index = order[turn, 0, :size]
                yield X[:, index], Y[:, index]
            else:
                index = order[turn, :, :size].index_select(0, which)
                yield X[:, index].movedim(1, 0).contiguous(), Y[:, index].movedim(1, 0).contiguous()


def train_blocks(
    weights: Sequence[Tensor],
    X: Tensor,
    Y: Tensor,
    *,
    loss,
    activation,
    surrogate: Surrogate | Sequence[Surrogate] | Callable[[BlockRuns, int], Surrogate],
    steps: int,
    ridge=0.0,
    schedule: Schedule | Sequence[Schedule] | None = None,
    backtracking: bool = False,
    batches: Minibatches | None = None,
    order: Sequence[int] | None = None,
    record_at: Iterable[int] | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> History:
    r"""Algorithm 1: ``steps`` block updates of S runs, :math:`W_j \leftarrow (1 - \alpha_k) W_j + \alpha_k D_j` (7).

    Args:
        weights: the start; not changed.
        loss, activation, ridge: as in ``lib.backpropagation``; a tensor as ``ridge`` has one number for each run.
        surrogate: one for all blocks, or J, or a function from the runs and the active block to one, such as
            ``certified``.
        schedule: the steps :math:`\alpha_k`; a sequence has one schedule for each run; None is the unit step.
        backtracking: find :math:`\gamma_j`, run by run, by doubling from half its last value until :math:`f(D) \le g(D)`,
            from the surrogate's on. Reads from the device, after every trial, whether all runs are done.
        batches: mini-batches, for (13); None takes all samples.
        order: the active blocks, repeated; 0 lets an iteration pass. None is the cyclic rule 1, ..., J.
        record_at: after how many updates to record; None takes about fifty, evenly on a logarithmic scale.
        chunk: how many runs to take at a time; None takes as many as ``MEMORY`` allows.
        progress: show a bar.

    Raises:
        ValueError: for settings that do not fit; before any work.
    """
    J, runs = len(weights), len(weights[0])
    order = tuple(range(1, J + 1)) if order is None else tuple(order)
    if not order or any(not isinstance(j, int) or not 0 <= j <= J for j in order):
        raise ValueError(f"order must hold blocks between 1 and {J}, or 0, got {order}")
    adaptive = callable(surrogate)
    if adaptive and backtracking:
        raise ValueError("backtracking must be False with a function as surrogate: both choose gamma")
    models = [surrogate] * J if adaptive or isinstance(surrogate, Surrogate) else list(surrogate)
    if len(models) != J:
        raise ValueError(f"surrogate must be one, or one for each of the {J} blocks, got {len(models)}")
    for model in models:
        if backtracking and not hasattr(model, "gamma"):
            raise ValueError(f"surrogate must have a gamma to be backtracked, got {model}")
    if backtracking and batches is not None:
        raise ValueError("backtracking must be False with batches: it compares values of the full objective")
    alphas = None if schedule is None else schedules.table(schedule, steps)
    if alphas is not None and alphas.ndim == 2 and alphas.shape[1] != runs:
        raise ValueError(f"schedule must be one, or one for each of the {runs} runs, got {alphas.shape[1]}")
    points = record_points(steps, record_at)
    _check_shared(X, Y)

    def one_chunk(part: slice) -> History:
        local = BlockRuns([W[part] for W in weights], X, Y, loss, activation, _select(ridge, part))
        mine = models if adaptive else [model.select(part).to(local.weights[0]) for model in models]
        steps_of = alphas if alphas is None or alphas.ndim == 1 else alphas[:, part]
        drawn = None if batches is None else batches.select(part)
        return _train_blocks(local, mine, steps, steps_of, backtracking, drawn, order, points, progress)

    return _in_chunks(one_chunk, runs, chunk or _chunk(weights, X))


def certified(runs: BlockRuns, j: int) -> Surrogate:
    """The surrogate (9) with ``certified_lipschitz`` for gamma: an upper bound by proof, so unit steps never raise f.

    For ``train_blocks``, with the squared loss and logistic or tanh units. Reads from the device that the targets are in
    range.
    """
    rest, Z = runs.weights[j - 1 :], runs.outputs(j - 1)
    return FirstOrder(1.0).at(certified_lipschitz(rest, 1, Z, runs.Y, runs.activations[j - 1 :], runs.ridge[j - 1 :]))


def block_step(
    runs: BlockRuns, j: int, surrogate: Surrogate, alpha: float | Tensor | None = None, gamma: Tensor | None = None
) -> Tensor | Backtracked:
    r"""One iteration of Algorithm 1: minimize the surrogate (6), and move block j (7).

    Args:
        runs: changed.
        alpha: the step, a number or ``(S,)``; None is the unit step.
        gamma: the last constants, ``(S,)``, to find new ones by backtracking; None leaves the surrogate as it is.

    Returns:
        The minimizer D, like :math:`W_j`, or with ``gamma`` what ``backtrack`` found.
    """
    W, problem = runs.weights[j - 1], runs.problem(j)
    found = surrogate.minimizer(problem, W) if gamma is None else backtrack(surrogate, problem, W, gamma)
    D = found if gamma is None else found.D
    if alpha is None:
        runs.replace(j, D)
    else:
        runs.replace(j, torch.lerp(W, D, alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha))
    return found


def _train_blocks(runs, models, steps, alphas, backtracking, batches, order, points, progress) -> History:
    X, Y = runs.X, runs.Y
    place = runs.weights[0]
    scalar = None if alphas is None or alphas.ndim == 2 else alphas.tolist()
    if alphas is not None and alphas.ndim == 2:
        alphas = alphas.to(place)
    fixed = None if callable(models[0]) else models
    log = Recorder(runs, fixed, steps, points, full_batch=batches is None)
    walk = None if batches is None else batches.walk(X, Y, steps)
    minimizers: list[Tensor | None] = [None] * runs.layers
    gammas = [_one_a_run(model.gamma, place) for model in models] if backtracking else None
    trials = torch.zeros(len(runs), dtype=torch.int64, device=place.device)
    for k in tqdm(range(1, steps + 1), disable=not progress, leave=False, desc="blocks"):
        log.before(k - 1)
        if walk is not None:
            runs.use(*next(walk))
        j = order[(k - 1) % len(order)]
        if j > 0:
            model = models[j - 1] if fixed else models[j - 1](runs, j)
            alpha = None if alphas is None else scalar[k - 1] if scalar else alphas[k - 1]
            found = block_step(runs, j, model, alpha, None if gammas is None else gammas[j - 1])
            minimizers[j - 1] = found if gammas is None else found.D
            if gammas is not None:
                gammas[j - 1] = found.gamma
                trials += found.trials
        if walk is not None and k in points:
            runs.use(X, Y)
    log.before(steps)
    gamma = torch.stack(gammas) if backtracking else None
    return log.history(minimizers, gamma, trials if backtracking else None)


def train_full(
    weights: Sequence[Tensor],
    X: Tensor,
    Y: Tensor,
    *,
    loss,
    activation,
    optimizer: Callable[[list[Tensor], Tensor], Optimizer],
    rates: Sequence[float] | Tensor,
    steps: int,
    ridge=0.0,
    record_at: Iterable[int] | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> History:
    """Back-propagation of all layers at once, ``steps`` times, with any optimizer: the baselines of Figure 2(a).

    Args:
        weights, X, Y, loss, activation, ridge, record_at, chunk, progress: as for ``train_blocks``.
        optimizer: from the stacked weights and the rates of their runs ``(S,)`` to an optimizer:
            ``lambda params, rates: SGD(params, lr=rates)``, or ``by_rate(torch.optim.Adagrad)``.
        rates: a rate for each run.
    """
    runs = len(weights[0])
    rates = torch.as_tensor(rates, dtype=torch.float64)
    if rates.shape != (runs,):
        raise ValueError(f"rates must have one entry for each of the {runs} runs, got shape {tuple(rates.shape)}")
    points = record_points(steps, record_at)
    _check_shared(X, Y)

    def one_chunk(part: slice) -> History:
        local = BlockRuns([W[part] for W in weights], X, Y, loss, activation, _select(ridge, part))
        for W in local.weights:
            W.grad = torch.zeros_like(W)
        rule = optimizer(local.weights, rates[part])
        log = Recorder(local, None, steps, points, full_batch=True)
        for k in tqdm(range(steps), disable=not progress, leave=False, desc="back-propagation"):
            log.before(k)
            for W, gradient in zip(local.weights, local.gradients(), strict=True):
                W.grad.copy_(gradient)
            rule.step()
            local.changed()
        log.before(steps)
        return log.history([None] * local.layers, None, None)

    return _in_chunks(one_chunk, runs, chunk or _chunk(weights, X))


def by_rate(rule: Callable[..., Optimizer], **settings) -> Callable[[list[Tensor], Tensor], Optimizer]:
    """An elementwise optimizer of ``torch.optim`` with a rate for each run: runs of equal rate form a parameter group.

    Neighbours of equal rate share a group, so order the runs by rate. The parameters of a group are views of the stacked
    weights, and so are their gradients.

    Args:
        rule: such as ``torch.optim.Adagrad``.
        settings: its other arguments.
    """

    def make(params: list[Tensor], rates: Tensor) -> Optimizer:
        values, counts = torch.unique_consecutive(rates, return_counts=True)
        groups, first = [], 0
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            views = []
            for W in params:
                view = W[first : first + count]
                view.grad = W.grad[first : first + count]
                views.append(view)
            groups.append({"params": views, "lr": value})
            first += count
        return rule(groups, **settings)

    return make


# ----------------------------------------------------------------------------------------------------------- chunks

MEMORY = {"cpu": 2**24, "gpu": 2**29}  # bytes of work space for a chunk; on a CPU it should stay in the cache


def _chunk(weights: Sequence[Tensor], X: Tensor) -> int:
    units = sum(W.shape[-2] for W in weights)
    memory = MEMORY["cpu" if X.device.type == "cpu" else "gpu"]
    most = max(1, memory // (3 * units * X.shape[-1] * X.element_size()))
    runs = len(weights[0])
    return -(-runs // -(-runs // most))  # as few chunks as possible, and all of about one size


def _check_shared(X: Tensor, Y: Tensor) -> None:
    for name, data in (("X", X), ("Y", Y)):
        if data.ndim != 2:
            raise ValueError(f"{name} must be one matrix for all runs, got shape {tuple(data.shape)}")


def _select(setting, part: slice):
    return setting[part] if isinstance(setting, Tensor) and setting.ndim else setting


def _one_a_run(value: float | Tensor, place: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=place.dtype, device=place.device).expand(len(place)).clone()


def _in_chunks(one_chunk: Callable[[slice], History], runs: int, chunk: int) -> History:
    parts = [one_chunk(slice(first, first + chunk)) for first in range(0, runs, chunk)]
    return parts[0] if len(parts) == 1 else History.join(parts)

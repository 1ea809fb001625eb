"""What a trainer of block by block updates writes down about its runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lib.block_runs import BlockRuns

ROUNDING = 500  # a change of f by so many units of rounding, 1e-13 in float64, does not count as an increase
DIGEST = 256  # updates between two looks at the values of f


@dataclass(frozen=True)
class History:
    """What S runs went through. R is the number of records.

    Attributes:
        steps: the number of updates before each record, ``(R,)``, from 0.
        objective: f, the L1 term of a ``SparseFirstOrder`` included, ``(R, S)``.
        loss: the data term of f alone, ``(R, S)``.
        gradient_norm: the norm of the full gradient of the smooth part, ``(R, S)``.
        weights: the J final weights.
        minimizers: the last surrogate minimizer D of each block; None for a block that was never active.
        increases: how many updates raised f (by more than rounding, 1e-13 of it in float64), ``(S,)``; with mini-batches -1.
        largest_increase: the largest change of f in one update, ``(S,)``; with mini-batches not a number.
        diverged_at: the number of updates after which f was first not finite, ``(S,)``; -1 for a run that stayed finite.
        gamma: the last constant of each block, ``(J, S)``, if it was found by backtracking.
        trials: trial evaluations in all updates of a run together, ``(S,)``, if there was backtracking.
    """

    steps: Tensor
    objective: Tensor
    loss: Tensor
    gradient_norm: Tensor
    weights: list[Tensor]
    minimizers: list[Tensor | None]
    increases: Tensor
    largest_increase: Tensor
    diverged_at: Tensor
    gamma: Tensor | None = None
    trials: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence["History"]) -> "History":
        """The runs of several histories with the same records, one after the other."""
        joined = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if field.name == "steps" or values[0] is None:
                joined[field.name] = values[0]
            elif isinstance(values[0], list):
                joined[field.name] = [None if v[0] is None else torch.cat(v) for v in zip(*values, strict=True)]
            else:
                joined[field.name] = torch.cat(values, dim=-1)
        return cls(**joined)


class Recorder:
    """Records of a chunk of runs, kept on the device."""

    def __init__(self, runs: BlockRuns, models, steps: int, points: list[int], full_batch: bool):
        self.runs, self.full_batch = runs, full_batch
        self.sparse = [(j, model) for j, model in enumerate(models or []) if hasattr(model, "weight")]
        self.steps, self.points, self.rows = torch.tensor(points), set(points), []
        place = runs.weights[0]
        self.recent: list[Tensor] = []  # f since the last digest, with its last value in front
        self.first = 0  # after how many updates
        self.increases = torch.zeros(len(runs), dtype=torch.int64, device=place.device)
        self.largest = torch.full_like(place[:, 0, 0], -torch.inf)
        self.diverged_at = torch.full_like(self.increases, -1)

    def before(self, k: int) -> None:
        """Look at the runs after k updates."""
        due = k in self.points
        if not (due or self.full_batch):
            return
        f = self.runs.objective()
        for j, model in self.sparse:
            f = f + model.penalty(self.runs.weights[j], 1)
        if not self.full_batch:
            self.recent, self.first = [], k
        self.recent.append(f)
        if len(self.recent) > DIGEST or not self.full_batch:
            self._digest()
        if due:
            squares = sum(g.square().sum((-2, -1)) for g in self.runs.gradients())
            self.rows.append(torch.stack((f, self.runs.data_loss(), squares.sqrt())))

    def _digest(self) -> None:
        """Many values of f at once: a step itself should cost little."""
        f = torch.stack(self.recent)
        broken = ~f.isfinite()
        when = self.first + broken.int().argmax(0)
        self.diverged_at = torch.where((self.diverged_at < 0) & broken.any(0), when, self.diverged_at)
        if len(f) > 1:
            change = f[1:] - f[:-1]
            self.increases += (change > ROUNDING * torch.finfo(f.dtype).eps * f[:-1].abs()).sum(0)
            self.largest = self.largest.fmax(change.nan_to_num(nan=-torch.inf, posinf=torch.inf).amax(0))
        self.first += len(f) - 1
        self.recent = [self.recent[-1]]

    def history(self, minimizers, gamma, trials) -> History:
        """All of it, once."""
        if self.full_batch:
            self._digest()
        objective, loss, gradient_norm = torch.stack(self.rows, dim=1)
        if not self.full_batch:
            self.increases, self.largest = torch.full_like(self.increases, -1), torch.full_like(self.largest, torch.nan)
        return History(
            self.steps, objective, loss, gradient_norm, self.runs.weights, minimizers, self.increases, self.largest,
            self.diverged_at, gamma, trials,
        )  # fmt: skip


def record_points(steps: int, record_at: Iterable[int] | None) -> list[int]:
    """After how many updates to record; about fifty, evenly on a logarithmic scale, if nobody says."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be a whole number, at least 0, got {steps!r}")
    if record_at is None:
        record_at = [0, steps, *(round(steps ** (i / 48)) for i in range(49))] if steps else [0]
    marks = sorted(set(record_at))
    if not marks or marks[0] < 0 or marks[-1] > steps:
        raise ValueError(f"record_at must hold numbers between 0 and {steps}, got {marks}")
    return marks

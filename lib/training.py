"""The training loop: all runs of an ensemble at once, with records, diverged runs, a memory bound and checkpoints.

Nothing inside a step looks at a value on the device: a step launches work and returns. Values are read at record
points only.
"""

import hashlib
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from lib.ensemble import Ensemble, Loss

MakeOptimizer = Callable[[Ensemble], Optimizer]
Quantity = Callable[[Ensemble], Tensor]


# ---------------------------------------------------------------------------------------------------------- batches


class Batches:
    """Mini-batches of a data set, epoch after epoch, in an order that is a function of the seed alone.

    The order of an epoch is a permutation drawn on the CPU, so a seed means the same on every device; its last
    incomplete batch is dropped. Batch k can be had without the k - 1 before it, which makes resuming exact.

    Attributes:
        per_epoch: number of batches in an epoch.
        per_run: whether each run has an order of its own.

    Args:
        inputs: ``(n, ...)``, on the device of the ensemble.
        targets: ``(n, ...)``.
        batch_size: examples in a batch; None gives the whole data set, unshuffled, at each step.
        seed: one seed, and all runs see the same batches (a sweep of step sizes); or a seed for each run of the
            ensemble, and run s sees what it would see alone with its seed (a sweep of seeds).

    Raises:
        ValueError: if inputs and targets differ in length, or ``batch_size`` is not between 1 and n.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int | None = None, seed: int | Sequence[int] = 0):
        if len(inputs) != len(targets):
            raise ValueError(f"targets must be as many as inputs, got {len(targets)} for {len(inputs)} inputs")
        if batch_size is not None and not 1 <= batch_size <= len(inputs):
            raise ValueError(f"batch_size must be between 1 and {len(inputs)}, got {batch_size}")
        self.inputs, self.targets = inputs, targets
        self.batch_size = batch_size
        self.seed = seed if isinstance(seed, int) else tuple(seed)
        self.per_run = batch_size is not None and not isinstance(seed, int)
        self.per_epoch = 1 if batch_size is None else len(inputs) // batch_size

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        return torch.randperm(len(self.inputs), generator=generator)[: self.per_epoch * self.batch_size]

    def order(self, epoch: int, runs: Sequence[int]) -> Tensor:
        """The examples of each batch of an epoch, ``(per_epoch, B)``, or ``(per_epoch, S, B)`` if ``per_run``."""
        if self.per_run:
            seeds = [self.seed[run] for run in runs]
            rows = torch.stack([self._permutation(seed, epoch).view(self.per_epoch, -1) for seed in seeds], dim=1)
        else:
            rows = self._permutation(self.seed, epoch).view(self.per_epoch, -1)
        return rows.to(self.inputs.device)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one batch, each with the axes of ``index`` in front."""
        return self.inputs[index], self.targets[index]

    def walk(self, runs: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Step number, inputs and targets for the steps from ``start`` up to and including ``stop``."""
        order = None
        for step in range(start, stop + 1):
            if self.batch_size is None:
                yield step, self.inputs, self.targets
                continue
            epoch, batch = divmod(step, self.per_epoch)
            if order is None or batch == 0:
                order = self.order(epoch, runs)
            yield step, *self.take(order[batch])


# --------------------------------------------------------------------------------------------------------- one step


def train_step(
    ensemble: Ensemble,
    optimizer: Optimizer,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    alive: Tensor,
    *,
    per_run: bool = False,
) -> tuple[Tensor, Tensor]:
    """One optimizer step of all runs that are alive.

    A run whose loss or gradient is not finite has diverged. From then on its gradient is zero: it stands still, and
    no optimizer ever meets a NaN or an infinity, which in a batched factorization would stop every run.

    Args:
        ensemble: S runs.
        optimizer: over its parameters.
        loss: from the outputs and targets of one run to a scalar.
        inputs: ``(N, ...)``, or ``(S, N, ...)`` with ``per_run``.
        targets: likewise.
        alive: which runs have not diverged, ``(S,)`` booleans.
        per_run: whether each run has a batch of its own.

    Returns:
        The losses before the step, ``(S,)``, and which runs are still alive, ``(S,)``.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = ensemble.losses(loss, inputs, targets, per_run=per_run)
    losses.sum().backward()
    gradients = [parameter.grad for parameter in ensemble.parameters() if parameter.grad is not None]
    alive = alive & losses.detach().isfinite()
    for gradient in gradients:
        # A sum passes on every NaN and infinity, at a fiftieth of the price of testing the elements on a CPU.
        alive = alive & gradient.reshape(len(alive), -1).sum(1).isfinite()
    for gradient in gradients:
        # nan_to_num and a product: on a CPU five times faster than ``torch.where``.
        gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(alive.view(-1, *[1] * (gradient.ndim - 1)))
    optimizer.step()
    return losses.detach(), alive


def _parameters_finite(ensemble: Ensemble) -> Tensor:
    finite = torch.ones_like(ensemble.runs, dtype=torch.bool)
    for parameter in ensemble.parameters():
        finite = finite & parameter.detach().isfinite().reshape(len(finite), -1).all(1)
    return finite


# ----------------------------------------------------------------------------------------------------------- memory


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are created while it is active, and their largest sum so far.

    It sees every storage an operation returns, on any device, until that storage is freed. It does not see what an
    operation allocates and frees inside itself, nor what the allocator holds back.

    Attributes:
        live: bytes alive now.
        peak: the largest value of ``live``.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in known and storage not in self._seen:
                    self._seen[storage] = None
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def runs_that_fit(
    ensemble: Ensemble,
    make_optimizer: MakeOptimizer,
    loss: Loss,
    batches: Batches,
    max_memory: int,
    quantities: Mapping[str, Quantity] | None = None,
) -> int:
    """How many runs can be trained at once in ``max_memory`` bytes.

    One step and one record of one run, then of two, are carried out on copies, and their peak memory counted:
    parameters, gradients, optimizer state, activations, batch and recorded quantities. Every term is linear in the
    number of runs, so the two give the peak of any number.

    Args:
        ensemble, make_optimizer, loss, batches, quantities: as for ``train``.
        max_memory: bytes for all tensors that training adds to the ensemble and the data. The process may take more:
            a C library that keeps freed blocks for later has been seen to double it.

    Returns:
        A number of runs between 1 and S.

    Raises:
        ValueError: if ``max_memory`` is too small for a single run; it says how much one run needs.
    """
    peaks = []
    for count in (1, 2):
        if count > len(ensemble):
            return 1
        with PeakMemory() as memory:
            part = ensemble.select(torch.arange(count, device=ensemble.runs.device))
            optimizer = make_optimizer(part)
            alive = torch.ones_like(part.runs, dtype=torch.bool)
            for _, inputs, targets in batches.walk(range(count), 0, 1):
                _measure(part, quantities or {})
                train_step(part, optimizer, loss, inputs, targets, alive, per_run=batches.per_run)
        peaks.append(memory.peak)
        del part, optimizer
    if peaks[0] > max_memory:
        raise ValueError(f"max_memory must be at least {peaks[0]} bytes to hold one run, got {max_memory}")
    fit = 1 + int((max_memory - peaks[0]) // max(peaks[1] - peaks[0], 1))
    return min(fit, len(ensemble))


# ------------------------------------------------------------------------------------------------------ checkpoints


def _digest(tensors: Sequence[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.tolist()}" if value.numel() <= 4 else f"{tuple(value.shape)} values {_digest([value])}"
    return f"{value}"


def _fingerprint(ensemble, make_optimizer, loss, batches, steps, record_every, quantities, chunk_size) -> dict:
    """What must be equal for a checkpoint to be continued to the same result; names and values are for people."""
    optimizer = make_optimizer(ensemble)
    groups = [
        {name: _describe(value) for name, value in group.items() if name != "params"}
        | {"sizes": [tuple(parameter.shape) for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {
        "network": f"{len(ensemble)} x {ensemble.copies}",
        "initial values": _digest([*ensemble.parameters(), *ensemble.buffers()]),
        "optimizer": f"{type(optimizer).__name__} {groups}",
        "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
        "data": _digest([batches.inputs, batches.targets]),
        "batch_size": f"{batches.batch_size}",
        "batch seed": f"{batches.seed}",
        "steps": f"{steps}",
        "record_every": f"{record_every}",
        "quantities": f"{sorted(quantities)}",
        "runs at once (max_memory)": f"{chunk_size}",
        "device": ensemble.runs.device.type,
        "torch": str(torch.__version__),
    }


def save_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` such that a crash at any moment leaves the old file or the new one, never part of one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    # The rename is durable once the directory is.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_checkpoint(path: Path, settings: Mapping[str, str], device: torch.device) -> dict | None:
    """The state to continue from, or None if there is none.

    A file that cannot be read, a truncated one say, is set aside as ``<name>.damaged``, with a warning.

    Raises:
        ValueError: if the checkpoint was made under other settings; it names them.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        saved = state["settings"]
    except Exception as error:  # whatever a damaged archive leads the reader to
        damaged = path.with_name(path.name + ".damaged")
        os.replace(path, damaged)
        reason = type(error).__name__
        warnings.warn(f"checkpoint {path} cannot be read ({reason}); kept as {damaged}, starting over", stacklevel=3)
        return None
    differing = [name for name in settings if saved.get(name) != settings[name]]
    if differing:
        what = "; ".join(f"{name} was {saved.get(name)}, is {settings[name]}" for name in differing)
        raise ValueError(f"checkpoint {path} belongs to other settings: {what}. Choose another path or delete it")
    return state


# --------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Training:
    """What training leaves behind, besides the trained ensemble.

    Attributes:
        records: one row for each run, record point and quantity: ``run``, ``step``, ``quantity``, ``value``. The value at
            step k belongs to the parameters after k updates; it is NaN once the run has diverged.
        runs: one row for each run: ``run``, ``status`` ("ok" or "diverged") and ``diverged_at``, the first step at which
            the loss or the gradient was not finite, missing for a run that is ok.
    """

    records: pd.DataFrame
    runs: pd.DataFrame


@torch.no_grad()
def _measure(ensemble: Ensemble, quantities: Mapping[str, Quantity]) -> list[Tensor]:
    return [quantity(ensemble) for quantity in quantities.values()]


def _record_steps(steps: int, record_every: int) -> list[int]:
    return sorted({*range(0, steps, record_every), steps})


def train(
    ensemble: Ensemble,
    make_optimizer: MakeOptimizer,
    loss: Loss,
    batches: Batches,
    steps: int,
    *,
    record_every: int = 1,
    quantities: Mapping[str, Quantity] | None = None,
    max_memory: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> Training:
    """Train every run of an ensemble, in place, for ``steps`` updates.

    Step k evaluates the losses on batch k and updates; at step ``steps`` the losses are evaluated and nothing more. A
    repeated call gives bit-identical results, and so does a call that continues a killed one from its checkpoint.

    Args:
        ensemble: the S runs; it holds the trained parameters afterwards.
        make_optimizer: from the runs that are trained at once to their optimizer, such as
            ``lambda part: SGD(part.parameters(), lr=rates[part.runs])``.
        loss: from the outputs and targets of one run to a scalar.
        batches: the data.
        steps: number of updates.
        record_every: the training loss and the quantities are recorded at steps 0, ``record_every``, ... and ``steps``.
        quantities: named functions from an ensemble to one value for each of its runs, ``(S,)``, to be recorded.
        max_memory: bytes of tensors that training may add to the ensemble and the data (see ``runs_that_fit``). Runs
            are trained in equal chunks, one chunk after the other, as many at once as fit. None trains all at once.
        checkpoint: file to continue from and to save to; it stays behind complete, and answers a repeated call.
        checkpoint_seconds: least time between two saves; saves happen at record points.
        progress: whether to show a progress bar.

    Returns:
        The records and the status of each run.

    Raises:
        ValueError: if an argument is out of range, ``max_memory`` is below what one run needs, or the checkpoint
            belongs to other settings.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if record_every < 1:
        raise ValueError(f"record_every must be at least 1, got {record_every}")
    if batches.per_run and len(batches.seed) != len(ensemble):
        raise ValueError(f"seed must have one entry for each of {len(ensemble)} runs, got {len(batches.seed)}")
    quantities = dict(quantities or {})
    device = ensemble.runs.device
    points = _record_steps(steps, record_every)
    chunk_size = len(ensemble)
    if max_memory is not None:
        chunk_size = runs_that_fit(ensemble, make_optimizer, loss, batches, max_memory, quantities)
    chunks = torch.arange(len(ensemble), device=device).tensor_split(-(-len(ensemble) // chunk_size))

    names = ["loss", *quantities]
    values = torch.full((len(points), len(names), len(ensemble)), torch.nan, dtype=torch.float64)
    survived = torch.zeros(len(ensemble), dtype=torch.int64)  # steps taken before divergence
    ok = torch.ones(len(ensemble), dtype=torch.bool)
    first_chunk, resumed = 0, None
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        settings = _fingerprint(ensemble, make_optimizer, loss, batches, steps, record_every, quantities, chunk_size)
        resumed = load_checkpoint(checkpoint, settings, device)
    if resumed is not None:
        ensemble.load_state_dict(resumed["ensemble"])
        values, survived, ok = (resumed[name].cpu() for name in ("values", "survived", "ok"))
        first_chunk = resumed["chunk"]
    saved_at = time.monotonic()

    def save(**state) -> None:
        results = {"values": values, "survived": survived, "ok": ok}
        save_checkpoint(checkpoint, {"settings": settings, "ensemble": ensemble.state_dict(), **results, **state})

    bar = tqdm(total=len(chunks) * steps, initial=first_chunk * steps, unit="step", disable=not progress)
    for number in range(first_chunk, len(chunks)):
        chunk = chunks[number]
        part = ensemble if len(chunks) == 1 else ensemble.select(chunk)
        optimizer = make_optimizer(part)
        alive = torch.ones_like(part.runs, dtype=torch.bool)
        alive_steps = torch.zeros_like(part.runs)
        start = 0
        if resumed is not None and resumed["step"] > 0:
            part.load_state_dict(resumed["part"])
            optimizer.load_state_dict(resumed["optimizer"])
            alive, alive_steps, start = resumed["alive"], resumed["alive_steps"], resumed["step"]
            bar.update(start)
        resumed = None
        columns = chunk.cpu()
        for step, inputs, targets in batches.walk(columns.tolist(), start, steps):
            recording = step % record_every == 0 or step == steps
            if recording:
                alive = alive & _parameters_finite(part)
                measured = _measure(part, quantities)
            if step < steps:
                losses, alive = train_step(part, optimizer, loss, inputs, targets, alive, per_run=batches.per_run)
                alive_steps += alive
                bar.update()
            else:
                with torch.no_grad():
                    losses = part.losses(loss, inputs, targets, per_run=batches.per_run)
                alive = alive & losses.isfinite()
            if recording:
                row = torch.stack([value.detach().cpu().double() for value in (losses, *measured)])
                values[points.index(step)][:, columns] = row.where(alive.cpu(), torch.nan)
                if checkpoint is not None and step < steps and time.monotonic() - saved_at >= checkpoint_seconds:
                    save(
                        chunk=number, step=step + 1, part=part.state_dict(), optimizer=optimizer.state_dict(),
                        alive=alive, alive_steps=alive_steps,
                    )  # fmt: skip
                    saved_at = time.monotonic()
        if part is not ensemble:
            ensemble.put(chunk, part)
        survived[columns], ok[columns] = alive_steps.cpu(), alive.cpu()
        if checkpoint is not None:
            save(chunk=number + 1, step=0)
    bar.close()
    return _tidy(ensemble.runs.tolist(), points, names, values, survived, ok)


def _tidy(runs, points, names, values, survived, ok) -> Training:
    index = pd.MultiIndex.from_product([points, names, runs], names=["step", "quantity", "run"])
    records = pd.Series(values.flatten().numpy(), index=index, name="value").reset_index()
    records = records[["run", "step", "quantity", "value"]]
    records = records.sort_values(["run", "step"], kind="stable", ignore_index=True)
    status = np.where(ok.numpy(), "ok", "diverged")
    diverged_at = pd.array(survived.numpy(), dtype="Int64")
    diverged_at[ok.numpy()] = pd.NA
    return Training(records, pd.DataFrame({"run": runs, "status": status, "diverged_at": diverged_at}))

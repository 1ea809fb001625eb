"""The least-squares phase diagram (Figure 1 of chapter 3) against NumPy: one panel, side by side in one process.

41 x 43 pairs of rates, 2,000 steps, d = 100. Peers: the loop that a reader of the paper would write first (one
configuration at a time, vectors of length d) and the vectorized form (all configurations at once). All three take
exactly the same steps; their results are compared before any ratio is reported. ``python -m benchmarks.least_squares``.
"""

from __future__ import annotations

import os
import platform
import statistics
import time

import numpy as np
import torch

from lib import least_squares as ols

DIMENSION, STEPS, KAPPA, FIRST_SCALE, REPEATS = 100, 2000, 1000.0, 0.1, 5
LOOP_EVERY = 16  # the loop runs every 16th configuration, and its time is scaled up by the exact count
COMPARED_STEPS = 10  # rounding differences grow once a run is chaotic, so agreement is asserted after this many steps


def loop(lam, g, a0, w0, steps_a, steps, count):
    """Plain NumPy, one configuration at a time."""
    ends = np.empty((len(steps), 1 + len(lam)))
    for run, (step_a, step) in enumerate(zip(steps_a, steps, strict=True)):
        a, w = a0, w0
        for _ in range(count):
            Hw = lam * w
            sigma_squared = w @ Hw
            sigma = np.sqrt(sigma_squared)
            y = w @ g
            a, w = a + step_a * (y / sigma - a), w + (step * a / sigma) * (g - (y / sigma_squared) * Hw)
        ends[run, 0], ends[run, 1:] = a, w
    return ends


def vectorized(lam, g, a0, w0, steps_a, steps, count):
    """NumPy, all configurations at once, in place: two products a step, no temporary beyond work space."""
    w = np.tile(w0, (len(steps), 1))
    a = np.full(len(steps), a0)
    Hw, push = np.empty_like(w), np.empty_like(w)
    for _ in range(count):
        np.multiply(w, lam, out=Hw)
        sigma_squared = np.einsum("bd,bd->b", w, Hw)
        sigma = np.sqrt(sigma_squared)
        y = w @ g
        c = steps * a / sigma
        a = a + steps_a * (y / sigma - a)
        Hw *= (c * y / sigma_squared)[:, None]
        w -= Hw
        np.multiply(c[:, None], g, out=push)
        w += push
    return np.concatenate((a[:, None], w), 1)


def ours(problem, a0, w0, steps_a, steps, count):
    """The same by ``ols.bngd``, eager, with the default chunks."""
    end = ols.bngd(problem, a0, w0, steps_a, steps, count)
    return torch.cat((end.a[:, None], end.w), 1).numpy()


def measure(repeats: int = REPEATS) -> list[dict]:
    """Ratios of wall time (peer over ours): median, min and max over interleaved repeats, after a warm-up.

    Raises ``AssertionError`` if the three do not agree to rounding after ``COMPARED_STEPS`` steps on all of them, or
    after all steps on those whose end does not depend on rounding.
    """
    problem = ols.LeastSquares(
        ols.log_spectrum(DIMENSION, KAPPA), ols.sphere((DIMENSION,), torch.Generator().manual_seed(0))
    )
    start = problem.correlation / torch.linalg.vector_norm(problem.correlation)
    grid = torch.cartesian_prod(
        torch.logspace(-5, 16, 43, dtype=torch.float64), 1.99 * torch.logspace(-10, 0, 41, dtype=torch.float64)
    )
    mine = (problem, FIRST_SCALE, start, grid[:, 1].contiguous(), grid[:, 0].contiguous())
    steps, steps_a = grid[:, 0].numpy().copy(), grid[:, 1].numpy().copy()
    peer = (problem.eigenvalues.numpy(), problem.correlation.numpy(), FIRST_SCALE, start.numpy())
    some = slice(None, None, LOOP_EVERY)
    part = (*peer, steps_a[some], steps[some])
    scale = len(steps) / len(steps[some])

    _assert_equal(ours(*mine, COMPARED_STEPS), vectorized(*peer, steps_a, steps, COMPARED_STEPS), steps)
    _assert_equal(ours(*mine, COMPARED_STEPS)[some], loop(*part, COMPARED_STEPS), steps[some])
    # Warm-up at full size for ours and vectorized NumPy; a tenth of the steps warms the loop.
    full, full_vectorized = ours(*mine, STEPS), vectorized(*peer, steps_a, steps, STEPS)
    loop(*part, STEPS // 10)
    calm = _same_under_rounding(mine, full)
    _assert_equal(full[calm], full_vectorized[calm], steps[calm], tolerance=1e-6)

    times = {"ours": [], "vectorized": [], "loop": []}
    for _ in range(repeats):
        times["ours"].append(_seconds(ours, *mine, STEPS)[0])
        times["vectorized"].append(_seconds(vectorized, *peer, steps_a, steps, STEPS)[0])
        seconds, ends = _seconds(loop, *part, STEPS)
        times["loop"].append(seconds * scale)
    _assert_equal(full[some][calm[some]], ends[calm[some]], steps[some][calm[some]], tolerance=1e-6)

    settings = {
        "grid": "41 x 43", "steps": STEPS, "dimension": DIMENSION, "kappa": KAPPA, "a_0": FIRST_SCALE,
        "repeats": repeats,
        "loop": f"{len(steps[some])} of {len(steps)} configurations (every {LOOP_EVERY}th), time scaled by the count",
        "compared": f"all configurations after {COMPARED_STEPS} steps; {int(calm.sum())} of {len(calm)} after {STEPS}",
        "torch threads": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "cores": os.cpu_count(), "load before": os.getloadavg()[0], "numpy": np.__version__, "torch": torch.__version__,
        "platform": platform.platform(),
    }  # fmt: skip
    return [
        _row("OLS phase diagram against a NumPy loop", times, "loop", 30, settings),
        _row("OLS phase diagram against vectorized NumPy", times, "vectorized", 1, settings),
    ]


def _seconds(function, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def _row(name, times, peer, at_least, settings):
    ratios = [theirs / ours for theirs, ours in zip(times[peer], times["ours"], strict=True)]
    return {
        "name": name,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "at_least": at_least,
        "seconds": {"ours": statistics.median(times["ours"]), peer: statistics.median(times[peer])},
        "peers": {"ours": "ols.bngd, eager", peer: (loop if peer == "loop" else vectorized).__doc__},
        "settings": settings,
    }


def _same_under_rounding(mine, full):
    """Configurations whose end moves by less than 1e-8 (relative) when the start is perturbed by 1e-13."""
    problem, a0, w0, steps_a, steps = mine
    noise = torch.randn(w0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = ours(problem, a0, w0 * (1 + 1e-13 * noise), steps_a, steps, STEPS)
    return _distance(full, moved) < 1e-8


def _distance(one, other):
    return np.abs(one - other).max(1) / np.abs(one).max(1)


def _assert_equal(one, other, steps, tolerance=1e-9):
    # Above 1e14 the first step's y is rounding (chapter 3, Figure 1): no two programs agree there.
    distance = _distance(one, other)[steps < 1e13]
    assert (distance < tolerance).all(), f"results differ by {distance.max():.1e} relative"


if __name__ == "__main__":
    for row in measure():
        print(row)

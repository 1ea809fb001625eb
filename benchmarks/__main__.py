"""Measure every ratio, write ``results/bench.json``, and say which fall short. Exit code 1 if any does."""

from __future__ import annotations

import json
import os
import platform
import sys
import time

import numpy
import torch

from benchmarks import bsum, dsgd, ensemble, least_squares, normalization
from lib import runtime


def main() -> int:
    rows = []
    for module in (least_squares, ensemble, bsum, dsgd, normalization):
        print(f"measuring {module.__name__} ...", file=sys.stderr, flush=True)
        for row in module.measure():
            rows.append(row)
            ratio, need = row["ratio"], row["at_least"]
            mark = "ok" if ratio["median"] >= need else "FALLS SHORT"
            print(
                f"{row['name']}: {ratio['median']:.3g}x [{ratio['min']:.3g}, {ratio['max']:.3g}], at least {need:.3g}x: {mark}"
            )
    environment = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "code": runtime.code_version(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    path = runtime.project_root() / "results" / "bench.json"
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"written to {path.relative_to(runtime.project_root())}", file=sys.stderr)
    return int(any(row["ratio"]["median"] < row["at_least"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

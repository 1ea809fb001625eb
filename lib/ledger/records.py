"""Records on disk: JSON lines, appended one at a time and flushed, so that an interrupted run loses nothing."""

from __future__ import annotations

import json
import math
import os
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath

from lib.ledger.evidence import Check


def check_to_json(check: Check, role: str) -> dict[str, Any]:
    """A check as plain JSON values; ``role`` is printed, corrected, counterexample or finding."""
    return {
        "role": role,
        "name": check.name,
        "measured": _plain(check.measured),
        "interval": _plain(check.interval),
        "relation": check.relation,
        "threshold": _plain(check.threshold),
        "exact": check.exact,
        "passed": check.passed,
        "text": check.text,
    }


def append(path: str | Path, record: dict[str, Any]) -> None:
    """Append one record as one line, in one write, and force it to disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of one file, the latest of each (claim, profile, seed) only, in the order of first decision.

    A torn line (the process was killed while writing) is reported with a warning and left out.
    """
    latest: dict[tuple, dict[str, Any]] = {}
    path = Path(path)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            latest[record["claim"], record["profile"], record["seed"]] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            warnings.warn(f"{path.name}: line {number} is not a whole record and is left out", stacklevel=2)
    return list(latest.values())


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return [mpmath.nstr(mpmath.mpf(end), 30) for end in value._mpi_]

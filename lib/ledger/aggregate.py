"""Over chapters, profiles and seeds: one row a claim, written as CSV, and compared with the published rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from lib import runtime
from lib.ledger import records
from lib.ledger.evidence import OPEN, UNDECIDED, VERDICTS
from lib.ledger.registry import Registry, load_registry

COLUMNS = (
    "claim",
    "chapter",
    "kind",
    "verdict",
    "measured",
    "threshold",
    "reported",
    "profile",
    "seeds",
    "data",
    "version",
    "seconds",
)


def collect(folder: str | Path, profile: str | None = None) -> list[dict[str, Any]]:
    """Every record under ``folder`` (``<profile>/seed-*/<chapter>.jsonl``), of one profile or of all."""
    found = []
    for path in sorted(Path(folder).glob(f"{profile or '*'}/seed-*/*.jsonl")):
        found += records.read(path)
    return found


def summarize(
    found: Iterable[dict[str, Any]], registry: Registry | None = None, profile: str = "quick"
) -> pd.DataFrame:
    """One row for each claim of the registry, in its order: see ``COLUMNS``.

    Where seeds disagree the verdict reads ``depends on seed (...)`` with the count of each. A claim without a record
    is *open*.
    """
    registry = load_registry() if registry is None else registry
    by_claim: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        if record["profile"] == profile and record["claim"] in registry:
            by_claim.setdefault(record["claim"], []).append(record)
    rows = []
    for claim in registry.values():
        group = sorted(by_claim.get(claim.id, ()), key=lambda r: r["seed"])
        row = {
            "claim": claim.id,
            "chapter": claim.chapter,
            "kind": claim.kind,
            "verdict": OPEN,
            "measured": "",
            "threshold": "",
            "reported": claim.reported,
            "profile": profile,
            "seeds": "",
            "data": "",
            "version": "",
            "seconds": "",
        }
        if group:
            key = _key_check(group[0])
            row |= {
                "verdict": _pooled_verdict(group),
                "measured": f"{key['name']}: {_value_text(key)}",
                "threshold": key["text"].split(f": {_value_text(key)} ", 1)[-1],
                "seeds": " ".join(str(r["seed"]) for r in group),
                "data": " | ".join(dict.fromkeys(r["data"] for r in group)),
                "version": " ".join(dict.fromkeys(r["version"] for r in group)),
                "seconds": f"{sum(r['seconds'] for r in group) / len(group):.2f}",
            }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _pooled_verdict(group: list[dict[str, Any]]) -> str:
    counts = Counter(record["verdict"] for record in group)
    if len(counts) == 1:
        return group[0]["verdict"]
    return "depends on seed (" + ", ".join(f"{v}: {counts[v]}" for v in VERDICTS if counts[v]) + ")"


def _key_check(record: dict[str, Any]) -> dict[str, Any]:
    """The check that carries the verdict: the first of the form that was accepted, or the first that failed."""
    role = {"holds as corrected": "corrected", "refuted": "counterexample"}.get(record["verdict"])
    checks = [c for c in record["checks"] if role is None or c["role"] == role]
    failed = [c for c in checks if not c["passed"]]
    return (failed or checks)[0]


def _value_text(check: dict[str, Any]) -> str:
    """The measured value as it stands in the check's own text, without the relation and the threshold."""
    return check["text"].removeprefix(check["name"] + ": ").rsplit(f" {check['relation']} ", 1)[0]


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write the rows as CSV, replacing the file in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".part")
    table.to_csv(partial, index=False, lineterminator="\n")
    partial.replace(path)


def read_table(path: str | Path) -> pd.DataFrame:
    """Rows written by :func:`write_table`, all as text. Raises ``ValueError`` if columns are missing."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"{str(path)!r} lacks the columns {', '.join(missing)}")
    return table[list(COLUMNS)]


def published() -> pd.DataFrame:
    """The ledger that this project publishes, ``results/ledger.csv`` (no rows where there is none yet)."""
    path = runtime.project_root() / "results" / "ledger.csv"
    return read_table(path) if path.is_file() else pd.DataFrame(columns=list(COLUMNS))


def compare(fresh: pd.DataFrame, reference: pd.DataFrame, registry: Registry | None = None) -> tuple[list[str], int]:
    """(disagreements, rows compared) between a fresh ledger and the published one.

    Rows are compared where claim, profile and data are equal. A different verdict is a disagreement; so is a statement
    (an exact claim) that was decided and is now undecided, open, or gone. An experiment that is undecided in the fresh
    run, for want of data, is not, nor is an experiment whose verdict ``varies`` between machines.
    """
    registry = load_registry() if registry is None else registry
    rows = {(r.claim, r.profile): r for r in fresh.itertuples()}
    profiles = {r.profile for r in fresh.itertuples()}
    problems, compared = [], 0
    for old in reference.itertuples():
        if old.profile not in profiles or old.verdict in (OPEN, UNDECIDED):
            continue
        if old.claim not in registry:
            problems.append(f"{old.claim}: published as {old.verdict!r}, no longer in the registry")
            continue
        new = rows.get((old.claim, old.profile))
        verdict = new.verdict if new is not None else OPEN
        exact = not registry[old.claim].experiment
        if verdict in (OPEN, UNDECIDED):
            if exact:
                problems.append(f"{old.claim}: published as {old.verdict!r} at {old.profile}, now {verdict!r}")
            continue
        if new.data != old.data or registry[old.claim].varies:
            continue
        compared += 1
        if verdict != old.verdict:
            problems.append(
                f"{old.claim}: published as {old.verdict!r} at {old.profile}, now {verdict!r} "
                f"({new.measured}; {new.threshold})"
            )
    return problems, compared


def verdict_counts(table: pd.DataFrame) -> dict[str, int]:
    """The number of rows by verdict, in the vocabulary's order; verdicts that depend on the seed last."""
    counts = Counter("depends on seed" if v.startswith("depends on seed") else v for v in table["verdict"])
    return {v: counts[v] for v in (*VERDICTS, "depends on seed") if counts[v]}

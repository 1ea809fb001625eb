"""Break the mathematics on purpose: a check that no broken formula can upset proves nothing.

``book/mutations/<chapter>.yml`` lists mutations: the claims they must upset, a replacement in the claim's check cell
(``cell``) or in a function of the library (``lib``), and why. The harness runs a chapter's cells in order; a cell that
decides claims is run first as it stands, then under each of its mutations. A mutation counts if the verdict changes; an
exception does not count. Claims that the profile is too small to decide are tried again at ``quick``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lib import ledger, runtime
from workflow.scripts.inputs import ROOT, chapter_table

MIN_WEIGHT = 3
DECIDING_PROFILES = ("smoke", "quick")


@dataclass(frozen=True)
class Mutation:
    """One replacement of text, in a cell (``function`` empty) or in the library function of that dotted name."""

    claims: tuple[str, ...]
    function: str
    replace: str
    by: str
    why: str


def load(path: Path, registry: ledger.registry.Registry) -> list[Mutation]:
    """The mutations of one file. Raises ``ValueError`` naming the entry that is wrong."""
    mutations = []
    for number, entry in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")) or [], start=1):
        try:
            place = entry.get("lib") or entry["cell"]
            mutation = Mutation(
                tuple(entry["claims"]),
                entry.get("lib", {}).get("function", ""),
                place["replace"],
                place["by"],
                entry["why"],
            )
            for claim in mutation.claims:
                registry[claim]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name}, entry {number}: {error}") from None
        mutations.append(mutation)
    return mutations


def replaced(text: str, mutation: Mutation, place: str) -> str:
    """``text`` with the mutation's replacement. Raises ``ValueError`` unless it applies exactly once."""
    count = text.count(mutation.replace)
    if count != 1:
        raise ValueError(f"{mutation.replace!r} occurs {count} times in {place}, it must occur once")
    return text.replace(mutation.replace, mutation.by)


@contextlib.contextmanager
def patched(mutation: Mutation) -> Iterator[None]:
    """The library with one function's code replaced, wherever it has been imported."""
    module_name, _, path = mutation.function.partition(".")
    owner: Any = importlib.import_module(f"lib.{module_name}")
    namespace = vars(owner)
    for name in path.split("."):
        target, owner = inspect.getattr_static(owner, name), getattr(owner, name)
    function = inspect.unwrap(target.fget if isinstance(target, property) else target)
    source = replaced(textwrap.dedent(inspect.getsource(function)), mutation, mutation.function)
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    made: dict[str, Any] = {}
    exec(
        compile("from __future__ import annotations\n" + "\n".join(lines[start:]), mutation.function, "exec"),
        dict(namespace),
        made,
    )
    original = function.__code__
    function.__code__ = made[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = original


class Chapter:
    """A chapter's notebook, run cell by cell in a namespace of its own; the cells that decide claims only on request."""

    def __init__(self, notebook: Path, profile: str, registry: ledger.registry.Registry, folder: Path):
        self.cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
        self.parameters = {"profile": profile, "ledger_dir": str(folder)}
        self.registry = registry
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """The claims and the source of each deciding cell, in order, with the cells before it run (but not the deciding)."""
        for cell in self.cells:
            source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
            claims = tuple(tag for tag in tags if tag in self.registry)
            if claims:
                yield claims, source
                continue
            self._execute(source, self.names)
            if "parameters" in tags:
                self.names |= self.parameters

    def verdicts(self, claims: tuple[str, ...], source: str) -> dict[str, str]:
        """The verdicts of one check cell, from a fresh copy of the notebook's names."""
        names = dict(self.names)
        book = names["ledger"]
        for claim in claims:
            book.decided.pop(claim, None)
        try:
            self._execute(source, names)
        except Exception as error:  # a mutated formula may well raise; that is reported, and is not a verdict
            return dict.fromkeys(claims, f"error: {type(error).__name__}: {error}")
        return {claim: book.decided[claim]["verdict"] if claim in book.decided else "no decision" for claim in claims}

    def forget(self) -> None:
        """Empty the caches of the notebook's helpers: what they hold was computed by another library."""
        for value in self.names.values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    @staticmethod
    def _execute(source: str, names: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(source, "<cell>", "exec"), names)


def run_chapter(chapter: str, profile: str, only: set[str] | None, say) -> list[dict[str, str]]:
    """Try every mutation of a chapter (of the claims ``only``, if given) and return one row a claim and mutation."""
    registry = ledger.load_registry()
    notebook = ROOT / "book" / f"{chapter_table()['chapters'][chapter]['notebook']}.ipynb"
    mutations = load(ROOT / "book" / "mutations" / f"{chapter}.yml", registry)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        book = Chapter(notebook, profile, registry, Path(folder))
        for claims, source in book.checks():
            wanted = set(claims) if only is None else set(claims) & only
            own = [m for m in mutations if set(m.claims) & wanted]
            if not wanted:
                continue
            before = book.verdicts(claims, source)
            outcomes = []
            for mutation in own:
                if mutation.function:
                    book.forget()
                    with patched(mutation):
                        after = book.verdicts(claims, source)
                    book.forget()
                else:
                    after = book.verdicts(claims, replaced(source, mutation, f"the cell of {', '.join(claims)}"))
                outcomes.append((mutation, after))
            for claim in sorted(wanted):
                mine = [(m, after) for m, after in outcomes if claim in m.claims] or [(None, {})]
                for mutation, after in mine:
                    rows.append(
                        {
                            "claim": claim,
                            "weight": registry[claim].weight,
                            "profile": profile,
                            "mutation": mutation.why if mutation else "",
                            "verdict": before[claim],
                            "mutated": after.get(claim, ""),
                        }
                    )
            say(f"{chapter} ({profile}): {', '.join(claims)}: {len(own)} mutations")
    return rows


def flips(row: dict[str, str]) -> bool:
    """Whether this mutation changed a verdict into another verdict."""
    return row["verdict"] in ledger.VERDICTS and row["mutated"] in ledger.VERDICTS and row["verdict"] != row["mutated"]


def unprotected(rows: list[dict[str, str]]) -> list[str]:
    """The decided claims of weight 3 and more that no mutation upsets."""
    decided = {
        row["claim"] for row in rows if row["weight"] >= MIN_WEIGHT and row["verdict"] != ledger.evidence.UNDECIDED
    }
    return sorted(decided - {row["claim"] for row in rows if flips(row)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", help="default: every chapter that has mutations")
    parser.add_argument("--output", type=Path, help="also write the rows as CSV")
    options = parser.parse_args()
    chapters = options.chapters or sorted(path.stem for path in (ROOT / "book" / "mutations").glob("*.yml"))
    begun, rows = time.monotonic(), []

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s  {text}", file=sys.stderr, flush=True)

    for chapter in chapters:
        found = run_chapter(chapter, "smoke", None, say)
        small = {row["claim"] for row in found if row["verdict"] == ledger.evidence.UNDECIDED}
        if small:
            found = [row for row in found if row["claim"] not in small] + run_chapter(chapter, "quick", small, say)
        rows += found
    if options.output:
        pd.DataFrame(rows).sort_values(["claim", "mutation"]).to_csv(options.output, index=False, lineterminator="\n")
    tried = [row for row in rows if row["mutation"]]
    for row in tried:
        if not flips(row):
            print(f"no effect on {row['claim']}: {row['mutation']} ({row['verdict']} -> {row['mutated']})")
    left = unprotected(rows)
    for claim in left:
        print(f"unprotected: {claim}")
    print(
        f"{sum(map(flips, tried))} of {len(tried)} mutations change the verdict; "
        f"{len(left)} decided claims of weight {MIN_WEIGHT} and more without one"
    )
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    runtime.resolve_profile("smoke")
    main()

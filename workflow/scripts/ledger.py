"""The ledger on the command line: write it from records, compare it with the published one, publish it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from lib import ledger, runtime


def write(records: list[Path], profile: str, output: Path) -> None:
    """One row a claim from these records of one profile."""
    found = [record for path in records for record in ledger.read(path)]
    table = ledger.summarize(found, profile=profile)
    ledger.write_table(table, output)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in ledger.verdict_counts(table).items())
    print(f"ledger ({profile}): {counts} -> {output}", file=sys.stderr)


def compare(fresh: Path, published: Path) -> int:
    """Print every disagreement between a fresh ledger and the published one; 1 if there is any."""
    problems, compared = ledger.compare(ledger.read_table(fresh), ledger.read_table(published))
    for problem in problems:
        print(f"disagreement: {problem}")
    print(f"{compared} rows of equal claim, profile and data compared, {len(problems)} disagreements")
    return 1 if problems else 0


def publish(fresh: Path, published: Path) -> None:
    """Put the rows of a fresh ledger into the published one, in place of its rows of the same profile.

    Where the fresh row is open, its chapter was not run, and the published row stays.
    """
    new = ledger.read_table(fresh)
    old = ledger.read_table(published) if published.is_file() else new.iloc[:0]
    is_open = new["verdict"] == ledger.evidence.OPEN
    same_profile = old["profile"].isin(new["profile"])
    kept = old[~same_profile | old["claim"].isin(new.loc[is_open, "claim"])]
    table = pd.concat([kept, new[~(is_open & new["claim"].isin(old.loc[same_profile, "claim"]))]])
    places = {name: number for number, name in enumerate((*runtime.PROFILES, *ledger.load_registry()))}
    ledger.write_table(table.sort_values(["profile", "claim"], key=lambda names: names.map(places)), published)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("write", help="records -> one row a claim")
    one.add_argument("records", type=Path, nargs="*")
    one.add_argument("--profile", required=True, choices=runtime.PROFILES)
    one.add_argument("--output", type=Path, required=True)
    for name, text in (("compare", "fail if verdicts differ"), ("publish", "replace the published rows")):
        command = commands.add_parser(name, help=text)
        command.add_argument("fresh", type=Path)
        command.add_argument("--published", type=Path, default=runtime.project_root() / "results" / "ledger.csv")
    options = parser.parse_args()
    if options.command == "write":
        write(options.records, options.profile, options.output)
    elif options.command == "compare":
        sys.exit(compare(options.fresh, options.published))
    else:
        publish(options.fresh, options.published)


if __name__ == "__main__":
    main()

"""Execute one notebook with papermill; the Snakefile calls this for chapters and for pages.

Progress is one line a section. A failing cell is named (number, tags, section, error) and the half-executed notebook is
kept. Records are written beside the build while the notebook runs and copied to their place when it is done, so that a
killed run loses nothing: the next one keeps the old file as ``*.previous.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError


class ReportingEngine(NBClientEngine):
    """papermill's own engine, saying which section has been reached and when."""

    label = ""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        begun, told, start_cell = time.monotonic(), [""], nb_man.cell_start

        def cell_start(cell, cell_index=None, **rest):
            section = section_of(nb_man.nb, cell_index)
            if section != told[0]:
                told[0] = section
                place = f"cell {cell_index + 1} of {len(nb_man.nb.cells)}"
                say(f"{cls.label}: {place}, {time.monotonic() - begun:.0f} s: {section}")
            return start_cell(cell, cell_index, **rest)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


def execute(source: Path, target: Path, parameters: dict[str, object], label: str) -> None:
    """Run ``source`` into ``target``. Exits with a message that names the cell if one fails."""
    papermill_engines.register("reporting", ReportingEngine)
    ReportingEngine.label = label
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part.ipynb")
    begun = time.monotonic()
    try:
        papermill.execute_notebook(
            source,
            partial,
            parameters,
            engine_name="reporting",
            kernel_name="python3",
            progress_bar=False,
            request_save_on_cell_execute=False,
        )
    except PapermillExecutionError as error:
        failed = target.with_suffix(".failed.ipynb")
        os.replace(partial, failed)
        notebook = papermill.iorw.load_notebook_node(str(failed))
        # papermill puts a banner on top of a failed notebook, so positions in the source are found by content.
        index = next(i for i, cell in enumerate(notebook.cells) if cell.source == error.source)
        tags = [t for t in notebook.cells[index].metadata.get("tags", []) if not t.startswith(("papermill", "hide-"))]
        say("\n".join(error.traceback[-12:]))
        sys.exit(
            f"{source}: the cell [{', '.join(tags) or 'no tag'}] in section {section_of(notebook, index)!r} failed: "
            f"{error.ename}: {error.evalue}\nThe notebook up to there: {failed}"
        )
    os.replace(partial, target)
    say(f"{label}: done, {time.monotonic() - begun:.0f} s")


def section_of(notebook, index: int) -> str:
    """The nearest heading at or above a cell."""
    for cell in reversed(notebook.cells[: index + 1]):
        headings = [line for line in cell.source.splitlines() if cell.cell_type == "markdown" and line.startswith("#")]
        if headings:
            return headings[-1].lstrip("# ").strip()
    return "start"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir", default="auto")
    parser.add_argument("--chapter", help="the chapter's slug, with --records and --live")
    parser.add_argument("--records", type=Path, help="where the finished run's records go")
    parser.add_argument("--live", type=Path, help="the folder of records while the run lasts")
    parser.add_argument("--ledger-dir", type=Path, help="the folder of ledgers that a page reads")
    options = parser.parse_args()

    ledger_dir = (options.live or options.ledger_dir).resolve()
    live = ledger_dir / options.profile / f"seed-{options.seed}" / f"{options.chapter}.jsonl"
    if options.records and live.exists():
        live.replace(live.with_suffix(".previous.jsonl"))
    data_dir = "auto" if options.data_dir == "auto" else str(Path(options.data_dir).resolve())
    parameters = {
        "profile": options.profile,
        "seed": options.seed,
        "device": options.device,
        "data_dir": data_dir,
        "ledger_dir": str(ledger_dir),
    }
    execute(options.source, options.target, parameters, f"{options.chapter or options.source.stem} ({options.profile})")
    if options.records:
        options.records.parent.mkdir(parents=True, exist_ok=True)
        if live.exists():
            shutil.copyfile(live, options.records)
        else:
            options.records.touch()


if __name__ == "__main__":
    main()

"""Render the site from executed notebooks: stage the sources, run Jupyter Book with warnings as errors, swap it in."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

from workflow.scripts.inputs import ROOT, chapter_table


def stage(folder: Path, notebooks: list[Path]) -> None:
    """Copy the book's text and configuration to ``folder``, with executed notebooks in place of the bare ones.

    The configuration differs from the project's in one point: nothing is executed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "book").mkdir(parents=True)
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["execute"]["execute_notebooks"] = "off"
    (folder / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.copy(ROOT / "_toc.yml", folder)
    for path in [*(ROOT / "book").glob("*.md"), ROOT / "book" / "references.bib"]:
        shutil.copy(path, folder / "book")
    for name in ("_static", "_ext"):
        shutil.copytree(ROOT / "book" / name, folder / "book" / name)
    names = {chapter: entry["notebook"] for chapter, entry in chapter_table()["chapters"].items()}
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            # papermill's injected cell repeats what the page's "This run" line says, with paths of the building machine.
            if "injected-parameters" in cell.metadata.get("tags", []):
                cell.metadata.tags.append("remove-cell")
        nbformat.write(notebook, folder / "book" / f"{names.get(path.stem, path.stem)}.ipynb")


def build(folder: Path, html: Path) -> None:
    """Run Jupyter Book on the staged sources and put its pages at ``html``. Exits if there is any warning."""
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(folder), "--all", "-n", "-W", "--keep-going"]
    log = folder.with_suffix(".log")
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text()
    warnings = [line for line in text.splitlines() if "WARNING" in line or "ERROR" in line]
    if code or warnings:
        print("\n".join(warnings) or text[-4000:], file=sys.stderr)
        sys.exit(f"rendering failed with {len(warnings)} warnings; the whole log: {log}")
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(folder / "_build" / "html", html)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", type=Path, nargs="+", help="executed notebooks")
    parser.add_argument("--build", type=Path, required=True, help="the build folder")
    options = parser.parse_args()
    folder = options.build.resolve() / "stage"
    stage(folder, options.notebooks)
    print("rendering the site (about half a minute)", file=sys.stderr, flush=True)
    html = options.build.resolve() / "html"
    build(folder, html)
    print(f"The book: {html / 'index.html'}", file=sys.stderr)


if __name__ == "__main__":
    main()

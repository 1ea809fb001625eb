"""What the Snakefile asks about: the chapters, their inputs, and the settings given with ``--config``."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import yaml

from lib import runtime

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("profile", "seeds", "device", "data_dir", "build")


def chapter_table() -> dict[str, Any]:
    """``workflow/chapters.yml``."""
    return yaml.safe_load((ROOT / "workflow" / "chapters.yml").read_text())


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's settings, validated before any job starts.

    ``profile``: a profile; ``seeds``: a seed or several (a list, or text such as ``"0 1 2"``); ``device``, ``data_dir``,
    ``build``: text. Raises ``ValueError`` naming the setting, its value and what is allowed, also for an unknown name.
    """
    runtime.refuse_unknown(config, SETTINGS, "--config setting")
    seeds = config.get("seeds", 0)
    seeds = seeds.split() if isinstance(seeds, str) else seeds if isinstance(seeds, (list, tuple)) else [seeds]
    try:
        seeds = [runtime.resolve_seed(int(s) if isinstance(s, str) else s) for s in seeds]
    except ValueError as error:
        raise ValueError(f"--config seeds: {error}") from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--config seeds must be one or more different seeds, got {seeds}")
    device = str(config.get("device", "auto"))
    runtime.resolve_device(device)
    return {
        "profile": runtime.resolve_profile(str(config.get("profile", "auto"))),
        "seeds": seeds,
        "device": device,
        "data_dir": str(config.get("data_dir", "auto")),
        "build": str(config.get("build", "_build")),
    }


def library_files(notebook: str) -> list[str]:
    """The files of ``lib`` that a notebook's code imports, directly or through one another."""
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    seen: set[str] = set()
    queue = {name for source in sources for name in _imports(source)}
    while queue:
        name = queue.pop()
        for path in _module_files(name):
            if path not in seen:
                seen.add(path)
                queue |= _imports((ROOT / path).read_text())
    return sorted(seen)


def data_files(names: list[str], data_dir: str) -> list[str]:
    """The files of these data sets that stand in ``data_dir`` (``"auto"``: ``$BOOK_DATA``); none where there is no folder."""
    folder = os.environ.get("BOOK_DATA") if data_dir == "auto" else data_dir
    if not folder:
        return []
    return sorted(str(path) for name in names for path in Path(folder).glob(f"{name}[._]*"))


def _imports(source: str) -> set[str]:
    """Dotted names under ``lib`` that this source imports. Lines that are not Python (``%magic``) are passed over."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    names = set()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name == "lib" or name.startswith("lib.")}


def _module_files(name: str) -> list[str]:
    """The files that importing this dotted name reads: the module or package, and the packages above it."""
    files = []
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        base = Path(*parts[:depth])
        files += [str(p) for p in (base.with_suffix(".py"), base / "__init__.py") if (ROOT / p).is_file()]
    return files

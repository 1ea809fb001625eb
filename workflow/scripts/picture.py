"""Take a figure out of an executed notebook, for the README: ``python -m workflow.scripts.picture NOTEBOOK NAME TARGET``."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import nbformat


def picture(notebook: Path, name: str) -> bytes:
    """The light picture (SVG) of the figure ``name``. Raises ``ValueError`` listing the figures that there are."""
    found = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            page = output.get("data", {}).get("text/html", "")
            for figure, data in re.findall(
                r'<figure id="fig-([^"]+)".*?class="only-light".*?base64,([^"]+)"', page, re.S
            ):
                found[figure] = base64.b64decode(data)
    if name not in found:
        raise ValueError(f"{notebook} has no figure {name!r}; it has {', '.join(found)}")
    return found[name]


if __name__ == "__main__":
    notebook, name, target = sys.argv[1:]
    Path(target).write_bytes(picture(Path(notebook), name))

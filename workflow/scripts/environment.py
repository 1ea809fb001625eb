"""Write ``environment.yml`` for conda and Binder from ``requirements.lock``: PyTorch from conda, the rest by pip."""

from __future__ import annotations

import re

from workflow.scripts.inputs import ROOT

HEAD = """\
# For conda and Binder: made by `make lock`. PyTorch is conda-forge's CPU build; the rest is requirements.lock without torch.
name: convergence-executed
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pytorch-cpu={torch}
  - make
  - pip
  - pip:
"""


def pins(text: str) -> dict[str, str]:
    """Package name -> version of every ``name==version`` line of a lock file."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, flags=re.M))


def environment(lock: str) -> str:
    """The text of ``environment.yml`` for this lock file."""
    versions = pins(lock)
    lines = [f"      - {name}=={version}" for name, version in versions.items() if name != "torch"]
    return HEAD.format(torch=versions["torch"]) + "\n".join(lines) + "\n      - --editable .\n"


if __name__ == "__main__":
    (ROOT / "environment.yml").write_text(environment((ROOT / "requirements.lock").read_text()))

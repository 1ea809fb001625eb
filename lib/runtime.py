"""Run parameters, profiles, devices, seeds and provenance: everything a chapter settles before it computes.

A chapter begins with ``run = runtime.start("bngd", profile=profile, seed=seed, ...)``. Every parameter is checked
there, before any work, and a bad one is refused by name. The sizes of an experiment then come from
``run.choose(smoke=..., quick=..., full=..., paper=...)``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PROFILES = ("smoke", "quick", "full", "paper")
PARAMETERS = ("profile", "seed", "device", "data_dir", "ledger_dir")
MAX_SEED = 2**31 - 1


def project_root() -> Path:
    """The folder that holds ``_toc.yml``: that of this library if it is there, else the nearest above the working
    directory, else the working directory itself (a library installed on its own)."""
    here = Path(__file__).resolve().parent.parent
    for folder in (here, Path.cwd(), *Path.cwd().parents):
        if (folder / "_toc.yml").is_file() and (folder / "book").is_dir():
            return folder
    return Path.cwd()


def resolve_profile(profile: str = "auto") -> str:
    """The profile to run: the given one, or for ``"auto"`` the environment's ``BOOK_PROFILE``, else ``"quick"``.

    Raises ``ValueError`` naming the source, the value and what is allowed.
    """
    source = "profile"
    if profile == "auto":
        profile, source = os.environ.get("BOOK_PROFILE") or "quick", "$BOOK_PROFILE"
    if profile not in PROFILES:
        raise ValueError(f"{source} must be one of {', '.join(PROFILES)} (or auto), got {profile!r}")
    return profile


def resolve_device(device: str = "auto") -> torch.device:
    """The torch device: ``"auto"`` takes CUDA, then MPS, then the CPU; any other name must exist on this machine.

    Raises ``ValueError`` for a name torch does not know or a device that is absent.
    """
    if not isinstance(device, str):
        raise ValueError(f'device must be a string such as "auto", "cpu", "cuda" or "cuda:1", got {device!r}')
    available = ["cpu", "meta"]
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if device == "auto":
        return torch.device(next((name for name in ("cuda", "mps") if name in available), "cpu"))
    if device not in available:
        raise ValueError(f"device must be auto or one of {', '.join(available)} on this machine, got {device!r}")
    return torch.device(device)


def resolve_seed(seed: int) -> int:
    """The seed as an ``int`` in [0, 2^31). Raises ``ValueError`` for anything else, booleans and floats included."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be an integer from 0 to {MAX_SEED}, got {seed!r}")
    return seed


def _resolve_folder(name: str, value: str | os.PathLike | None) -> Path | None:
    if value is None or value == "auto":
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ValueError(f'{name} must be "auto" or a path, got {value!r}')
    path = Path(value).expanduser()
    path = path if path.is_absolute() else Path.cwd() / path
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {str(path)!r}")
    return path


def _injected_parameters() -> dict[str, Any]:
    """Names that papermill put into this notebook: the assignments of the executed cell starting ``# Parameters``."""
    try:
        from IPython import get_ipython
    except ImportError:
        return {}
    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell is not None else []
    injected = [cell for cell in cells if cell.lstrip().startswith("# Parameters")]
    names: dict[str, Any] = {}
    for statement in ast.parse(injected[-1]).body if injected else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names[statement.targets[0].id] = ast.unparse(statement.value)
    return names


def refuse_unknown(names: dict[str, Any], allowed=PARAMETERS, source: str = "parameter") -> None:
    """Raise ``ValueError`` if ``names`` has a key outside ``allowed``, naming each with its value and what is allowed."""
    unknown = [f"{name}={value}" for name, value in names.items() if name not in allowed]
    if unknown:
        raise ValueError(f"unknown {source} {', '.join(unknown)}; allowed: {', '.join(allowed)}")


@functools.cache
def code_version() -> str:
    """The commit this code is from, with ``+`` where the working tree differs; without git, a digest of ``lib/``."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root)]
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.split()
        if Path(top[0]).resolve() == root:
            status = subprocess.run(
                [*git, "status", "--porcelain", "--", "lib", "book"],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout
            return top[1] + ("+" if status.strip() else "")
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"lib-{digest.hexdigest()[:10]}"


@dataclass
class Run:
    """One execution of a chapter, with validated parameters. Made by :func:`start`."""

    chapter: str
    profile: str
    seed: int
    device: torch.device
    data_dir: Path | None
    ledger_dir: Path
    started: float = field(default_factory=time.time)
    data: list[str] = field(default_factory=list)

    def choose(self, *, smoke: Any, quick: Any, full: Any = None, paper: Any = None) -> Any:
        """The value for this run's profile. ``full`` defaults to ``quick``, ``paper`` to ``full``."""
        full = quick if full is None else full
        return {"smoke": smoke, "quick": quick, "full": full, "paper": full if paper is None else paper}[self.profile]

    def reaches(self, profile: str) -> bool:
        """Whether this run is at ``profile`` or a larger one."""
        return PROFILES.index(self.profile) >= PROFILES.index(resolve_profile(profile))

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator for the stream ``name``, fixed by (seed, chapter, name) and thus equal on every device.

        Tensors are drawn on the CPU and then moved, so that a seed means the same everywhere.
        """
        digest = hashlib.sha256(f"{self.seed}/{self.chapter}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    @property
    def double_device(self) -> torch.device:
        """The device for float64 work: this run's, or the CPU where the device has no float64 (MPS)."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def note_data(self, provenance: str) -> None:
        """Remember a data set that this run used; it appears in the provenance of the page and of the records."""
        if provenance not in self.data:
            self.data.append(provenance)

    def provenance(self) -> dict[str, str]:
        """What ran, on what, with what: shown on the page and stored with every record."""
        device = str(self.device)
        if self.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self.device)})"
        return {
            "profile": self.profile,
            "seed": str(self.seed),
            "device": device,
            "threads": str(torch.get_num_threads()),
            "data": "; ".join(self.data) or "none",
            "version": code_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": f"{platform.system()} {platform.machine()}",
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.started)),
        }

    def _repr_markdown_(self) -> str:
        facts = self.provenance()
        return "**This run:** " + ", ".join(f"{key} {value}" for key, value in facts.items()) + "."


def start(
    chapter: str,
    *,
    profile: str = "auto",
    seed: int = 0,
    device: str = "auto",
    data_dir: str | os.PathLike | None = "auto",
    ledger_dir: str | os.PathLike | None = "auto",
) -> Run:
    """Validate the parameters of a chapter's run and set torch's global seed.

    ``profile="auto"`` reads ``$BOOK_PROFILE``, else takes ``quick``; ``device="auto"`` takes CUDA, MPS or the CPU;
    ``data_dir="auto"`` leaves the choice to the data loader (``$BOOK_DATA``, then its cache); ``ledger_dir="auto"``
    is ``$BOOK_LEDGER``, else ``_build/ledger/interactive`` under the project. Raises ``ValueError`` for a bad value,
    and for a name that papermill injected but no chapter knows.
    """
    refuse_unknown(_injected_parameters())
    run = Run(
        chapter=chapter,
        profile=resolve_profile(profile),
        seed=resolve_seed(seed),
        device=resolve_device(device),
        data_dir=_resolve_folder("data_dir", data_dir),
        ledger_dir=_resolve_folder("ledger_dir", ledger_dir)
        or _resolve_folder("$BOOK_LEDGER", os.environ.get("BOOK_LEDGER"))
        or project_root() / "_build" / "ledger" / "interactive",
    )
    torch.manual_seed(run.seed)
    return run

"""A copy of the project in which the book is built once at profile smoke and then broken in many ways."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Copy:
    """The project in a folder of its own."""

    folder: Path

    def command(self, *words, **options):
        """Run a command here, without this session's settings, and return the finished process with its text."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BOOK_") or k == "BOOK_DATA"}
        environment["PYTHONPATH"] = str(self.folder)  # this copy's lib, not the installed one
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            words, cwd=options.pop("cwd", self.folder), env=environment | options.pop("env", {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=900, **options,
        )  # fmt: skip

    def snakemake(self, *options, **config):
        settings = [f"{k}={v}" for k, v in ({"profile": "smoke"} | config).items()]
        return self.command(sys.executable, "-m", "snakemake", "--cores", "2", *options, "--config", *settings)

    def planned(self, **config):
        """The jobs that a run would execute, as (rule, wildcards) text."""
        done = self.snakemake("--dry-run", **config)
        assert done.returncode == 0, done.stdout
        jobs, rule = [], None
        for line in done.stdout.splitlines():
            if line.startswith(("rule ", "localrule ")):
                rule = line.split()[1].rstrip(":")
                jobs.append(rule)
            elif line.strip().startswith("wildcards:") and rule in ("execute", "page"):
                words = dict(part.strip().split("=") for part in line.split(":", 1)[1].split(","))
                jobs[-1] = words.get("chapter") or words["page"]
        return set(jobs) - {"book"}


def copy_project(folder: Path) -> Copy:
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
        capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return Copy(folder)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The project with the book built once at profile smoke."""
    copy = copy_project(tmp_path_factory.mktemp("project"))
    done = copy.snakemake()
    assert done.returncode == 0, done.stdout[-6000:]
    return copy


@pytest.fixture
def change(built):
    """A function that changes a file's text; the old text comes back after the test."""
    kept = {}

    def apply(name, edit):
        path = built.folder / name
        kept.setdefault(path, (path.read_text() if path.exists() else None, path.stat() if path.exists() else None))
        path.write_text(edit(kept[path][0] or ""))

    yield apply
    for path, (text, stat) in kept.items():
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

"""The directories that hold converted data sets: where they are, reading, storing, and one writer at a time."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from lib.datasets import connections, formats
from lib.datasets.fetch import set_aside
from lib.datasets.formats import Arrays, CorruptData


@dataclass(frozen=True)
class Place:
    """A directory to look in; `writable`: may files be renamed and written there?"""

    path: Path
    title: str
    writable: bool


def user_cache() -> Path:
    """The user's cache directory of this project, under `XDG_CACHE_HOME` or `~/.cache`; it may not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "convergence-executed"


def places(data_dir: str | os.PathLike | None) -> list[Place]:
    """Directories to look in, in order: `data_dir` or the one named by `BOOK_DATA`, then the user's cache.

    Raises `ValueError` when `data_dir` is empty or names a file.
    """
    own = Place(user_cache(), "the user cache", True)
    shared = os.environ.get("BOOK_DATA")
    if data_dir is not None:
        path = Path(data_dir).expanduser()
        if not os.fspath(data_dir) or (path.exists() and not path.is_dir()):
            raise ValueError(f"data_dir must be a directory or None, got {os.fspath(data_dir)!r}")
        return [Place(path, "data_dir", _may_write(path)), own]
    if shared:
        path = Path(shared).expanduser()
        if not path.is_dir():
            warnings.warn(f"BOOK_DATA={shared!r} is not a directory and is ignored", stacklevel=3)
            return [own]
        return [Place(path, "BOOK_DATA", False), own]  # a shared directory is never written to
    return [own]


def _may_write(path: Path) -> bool:
    if not path.exists():
        return True
    # the permission bits are asked too, because the superuser may write anywhere and should not
    return os.access(path, os.W_OK) and bool(path.stat().st_mode & 0o222)


def files(spec: dict) -> dict[str, dict]:
    """Names of the files that hold a data set, each with its part of the manifest's entry."""
    return spec["files"] if "files" in spec else {spec["file"]: spec} if "file" in spec else {}


def read(path: Path, spec: dict) -> Arrays:
    """Verified arrays of the data set's file at `path`.

    A file of the published size must have the published SHA-256; a file of another size is somebody's conversion,
    and its arrays must have the published digests. Where only the digests of the files are published, no other file
    will do. Raises `FileNotFoundError`, `OSError`, `CorruptData`.
    """
    data = path.read_bytes()  # once: what is checked is what is parsed
    if "format" in spec:
        formats.check_digest(data, spec["sha256"], path.name)
        return parse(data, spec)
    published = len(data) == spec["bytes"]
    if published:
        formats.check_digest(data, spec["sha256"], path.name)
    if path.suffix == ".gz":
        arrays = formats.regression(formats.gunzip_table(data, path, [*spec["inputs"], spec["target"]]))
        formats.check_arrays(arrays, spec["arrays"])
        return arrays
    if not (published and spec.get("slow_to_unpack")):
        return formats.read_npz(data, spec["arrays"])
    copy = user_cache() / path.name
    if copy != path:
        try:
            return formats.read_npz(copy.read_bytes(), spec["arrays"])
        except CorruptData as error:
            set_aside(copy, error)
        except OSError:
            pass
    arrays = formats.read_npz(data, spec["arrays"])
    if copy != path:
        store(copy, arrays)
    return arrays


def parse(data: bytes, part: dict) -> Arrays:
    """Arrays of the published file `data` that holds one `split` of a data set in a `format` of its own."""
    inputs, labels = {"matlab": formats.parse_digits_mat, "connections": connections.parse}[part["format"]](data)
    return {f"x_{part['split']}": inputs, f"y_{part['split']}": labels}


def keep(folder: Path, spec: dict, arrays: Arrays, work: Path) -> None:
    """Keep a data set in `folder`: `arrays` in its one file, or its published files, which are in `work`, as they are.

    A full or read-only disk costs a warning, not the data.
    """
    if "files" in spec:
        for name in spec["files"]:
            try:
                os.replace(work / name, folder / name)
            except OSError as error:
                warnings.warn(f"could not keep {folder / name}: {error}", stacklevel=2)
    elif "inputs" in spec:
        names = [*spec["inputs"], spec["target"]]
        columns = np.column_stack([arrays["x_train"], arrays["y_train"]]).T
        store(folder / spec["file"], dict(zip(names, columns, strict=True)))
    else:
        store(folder / spec["file"], arrays)


def store(path: Path, arrays: Arrays) -> None:
    """Keep `arrays` at `path` for the next time; a full or read-only disk costs a warning, not the data."""
    write = formats.write_table if path.suffix == ".gz" else formats.write_npz
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, arrays)
    except OSError as error:
        warnings.warn(f"could not keep {path}: {error}", stacklevel=2)


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of data set `name` in `folder`, so that of several processes one fetches and the rest wait."""
    lock = filelock.FileLock(folder / f".{name}.lock")
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                tqdm.write(f"waiting for another process that prepares {name}", file=sys.stderr)
                lock.acquire()
            held.callback(lock.release)
        except OSError as error:
            warnings.warn(f"no lock in {folder}: {error}", stacklevel=3)
        yield

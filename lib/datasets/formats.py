"""Readers of the published file formats: bytes in, plain NumPy arrays out, nothing trusted and nothing unpickled."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

Arrays = dict[str, np.ndarray]
SPLITS = ("train", "test")


class CorruptData(ValueError):
    """A file or an array is not what the manifest says it is."""


def sha256(data: bytes | np.ndarray | Path) -> str:
    """SHA-256, in hexadecimal, of bytes, of an array's bytes in C order, or of a file (read in pieces)."""
    if isinstance(data, Path):
        with data.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data).hexdigest()


def check_digest(data: bytes | Path, expected: str, what: str) -> None:
    """Raise `CorruptData` naming `what` unless the SHA-256 of `data` is `expected`."""
    found = sha256(data)
    if found != expected:
        raise CorruptData(f"{what}: SHA-256 is {found}, expected {expected}")


def check_arrays(arrays: Mapping[str, np.ndarray], expected: Mapping[str, dict]) -> None:
    """Raise `CorruptData` unless `arrays` has exactly the expected names, shapes, types and SHA-256 digests.

    Where the manifest has no digest of an array, the file that it was read from has been checked.
    """
    if set(arrays) != set(expected):
        raise CorruptData(f"arrays are {sorted(arrays)}, expected {sorted(expected)}")
    for name, want in expected.items():
        array = arrays[name]
        if list(array.shape) != want["shape"] or array.dtype != want["dtype"]:
            raise CorruptData(f"{name} is {array.dtype} {list(array.shape)}, expected {want['dtype']} {want['shape']}")
        if "sha256" in want:
            check_digest(array, want["sha256"], f"array {name}")


def read_npz(data: bytes, expected: Mapping[str, dict]) -> Arrays:
    """Arrays of an `.npz` archive, checked as in `check_arrays`; raises `CorruptData`, never unpickles."""
    if not data.startswith(b"PK"):
        raise CorruptData("not a zip archive")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            if set(archive.files) != set(expected):
                raise CorruptData(f"arrays are {sorted(archive.files)}, expected {sorted(expected)}")
            for name, want in expected.items():  # the sizes are known: refuse to unpack anything larger
                size = archive.zip.getinfo(f"{name}.npy").file_size
                nbytes = int(np.prod(want["shape"])) * np.dtype(want["dtype"]).itemsize
                if not nbytes <= size <= nbytes + 4096:
                    raise CorruptData(f"{name} unpacks to {size} bytes, expected {nbytes} and a header")
            arrays = {name: archive[name] for name in expected}
    except CorruptData:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything, from BadZipFile to SyntaxError
        raise CorruptData(f"unreadable npz: {type(error).__name__}: {error}") from error
    check_arrays(arrays, expected)
    return arrays


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write an uncompressed `.npz`, atomically."""
    with _replacing(path) as stream:
        np.savez(stream, **arrays)


def write_table(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns (n,) as gzipped comma-separated text under a line of their names, atomically and exactly."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    text = "".join(f"{','.join(map(str, row))}\n" for row in [tuple(columns), *rows])
    with _replacing(path) as stream:
        stream.write(gzip.compress(text.encode(), mtime=0))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file `path`: readers see the old file, no file, or the whole new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def gunzip(path: Path, size: int) -> bytes:
    """Uncompressed content of a gzip file, which must be exactly `size` bytes; raises `CorruptData`."""
    data = _unpack(path, path, size)
    if len(data) != size:
        raise CorruptData(f"{path.name}: unpacks to {len(data)} bytes or more, expected {size}")
    return data


def _unpack(path: Path, content: Path | BinaryIO, limit: int) -> bytes:
    """The unpacked `content` of a gzip file, of which more than `limit` bytes are cut down to `limit` + 1."""
    try:
        with gzip.open(content) as stream:
            data = stream.read(limit + 1)
            stream.read(1)  # reading to the end makes gzip compare its own checksum
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptData(f"{path.name}: damaged gzip file: {error}") from error
    return data


def parse_idx(data: bytes) -> np.ndarray:
    """Array (uint8, any shape) of an idx file: bytes 0 0 8 ndim, then ndim big-endian sizes, then the values."""
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise CorruptData(f"not an idx file of bytes: it starts with {data[:4]!r}")
    ndim = data[3]
    offset = 4 + 4 * ndim
    if len(data) < offset:
        raise CorruptData(f"idx header of {ndim} sizes is cut off after {len(data)} bytes")
    shape = struct.unpack(f">{ndim}I", data[4:offset])
    count = int(np.prod(shape, dtype=object))
    if len(data) != offset + count:
        raise CorruptData(f"idx file of shape {shape} has {len(data) - offset} values, expected {count}")
    return np.frombuffer(data, np.uint8, offset=offset).reshape(shape)


def parse_cifar_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels (n,), uint8, of a CIFAR-10 binary batch: a label, then 3 planes of 1024."""
    record = 1 + 3 * 32 * 32
    if not data or len(data) % record:
        raise CorruptData(f"a CIFAR-10 binary batch is a multiple of {record} bytes, got {len(data)}")
    table = np.frombuffer(data, np.uint8).reshape(-1, record)
    planes = table[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), table[:, 0].copy()


def read_cifar_tar(path: Path, members: Mapping[str, str]) -> Arrays:
    """Arrays of a CIFAR-10 binary archive; `members` maps each batch, in order, to its SHA-256."""
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in members:
                    data = archive.extractfile(member).read()
                    check_digest(data, members[name], name)
                    batches[name] = parse_cifar_binary(data)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptData(f"{path.name}: damaged archive: {error}") from error
    return _join(batches, list(members))


def parse_png_rows(data: bytes) -> np.ndarray:
    """Images (n, 32, 32, 3), uint8, of an RGB picture 1024 wide with one image a row."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.mode != "RGB" or picture.width != 1024:
                raise CorruptData(f"picture is {picture.mode}, {picture.width} wide, expected RGB, 1024 wide")
            return np.array(picture).reshape(-1, 32, 32, 3)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise CorruptData(f"unreadable PNG: {error}") from error


def parse_labels_json(data: bytes) -> np.ndarray:
    """Labels (n,), uint8, of a JSON list of whole numbers from 0 to 255."""
    try:
        labels = np.array(json.loads(data))
    except ValueError as error:
        raise CorruptData(f"unreadable JSON labels: {error}") from error
    if labels.ndim != 1 or labels.dtype.kind != "i" or labels.min() < 0 or labels.max() > 255:
        raise CorruptData(f"JSON labels are {labels.dtype} {labels.shape}, expected a list of small numbers")
    return labels.astype(np.uint8)


def read_png_batches(files: Mapping[str, bytes], digests: Mapping[str, str]) -> Arrays:
    """CIFAR-10 arrays of PNG batches (one image a row) and two JSON label lists.

    `digests` maps `train_lables.json`, `test_lables.json` (spelt so in the package) and the pictures, in order,
    to their SHA-256; every file is checked before it is decoded. Raises `CorruptData`.
    """
    missing = sorted(set(digests) - set(files))
    if missing:
        raise CorruptData(f"missing {', '.join(missing)}")
    for name, digest in digests.items():
        check_digest(files[name], digest, name)
    arrays: Arrays = {}
    for split in SPLITS:
        # the training pictures are data_batch_k.png, the test picture is test_batch.png
        prefix = "test" if split == "test" else "data"
        pictures = [name for name in digests if name.endswith(".png") and name.startswith(prefix)]
        arrays[f"x_{split}"] = np.concatenate([parse_png_rows(files[name]) for name in pictures])
        arrays[f"y_{split}"] = parse_labels_json(files[f"{split}_lables.json"])
    return arrays


def parse_labelled_csv(data: bytes, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, *shape) and labels (n,), uint8, of comma-separated text with the label in the last column."""
    try:
        table = np.loadtxt(io.BytesIO(data), np.uint8, delimiter=",", ndmin=2)
        return table[:, :-1].reshape(-1, *shape), table[:, -1].copy()
    except ValueError as error:
        raise CorruptData(f"unreadable table: {error}") from error


def parse_table(data: bytes, columns: Sequence[str]) -> np.ndarray:
    """Named columns, (n, len(columns)) float64, of comma-separated text whose first line has the names."""
    try:
        header, _, rows = data.decode("ascii").partition("\n")
        names = [name.strip(' "\r') for name in header.split(",")]
        return np.loadtxt(io.StringIO(rows), delimiter=",", ndmin=2)[:, [names.index(name) for name in columns]]
    except (ValueError, IndexError) as error:
        raise CorruptData(f"unreadable table: {error}") from error


def parse_rows_of_numbers(data: bytes, width: int) -> np.ndarray:
    """Rows (n, width), float64, of a text: the lines that are exactly `width` numbers, whatever stands around them."""
    rows = []
    for line in data.decode("latin-1").splitlines():
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            continue  # a line of the description
        if len(row) == width:
            rows.append(row)
    return np.array(rows).reshape(-1, width)


def gunzip_table(data: bytes, path: Path, columns: Sequence[str], limit: int = 1 << 20) -> np.ndarray:
    """As `parse_table`, of the gzipped text `data` of the file `path`; raises `CorruptData`."""
    text = _unpack(path, io.BytesIO(data), limit)
    if len(text) > limit:
        raise CorruptData(f"{path.name}: unpacks to more than {limit} bytes")
    return parse_table(text, columns)


def regression(table: np.ndarray) -> Arrays:
    """Arrays of a regression set without a test part, from a table whose last column is the target."""
    x, y = np.ascontiguousarray(table[:, :-1]), table[:, -1].copy()
    return {"x_train": x, "y_train": y, "x_test": x[:0], "y_test": y[:0]}


def parse_digits_mat(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels (n,), uint8, of a MATLAB file of `X` (32, 32, 3, n) and `y`, where 10 means 0."""
    from scipy.io import loadmat  # half a second: only when it is asked for

    try:
        content = loadmat(io.BytesIO(data), variable_names=["X", "y"])
        images, labels = content["X"], content["y"].ravel()
    except Exception as error:  # a damaged file can raise nearly anything
        raise CorruptData(f"unreadable MATLAB file: {type(error).__name__}: {error}") from error
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise CorruptData(f"X is {images.dtype} {list(images.shape)}, expected uint8 [32, 32, 3, {len(labels)}]")
    if not np.isin(labels, np.arange(1, 11)).all():
        raise CorruptData("labels are expected from 1 to 10")
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), (labels % 10).astype(np.uint8)


def _join(batches: Mapping[str, tuple[np.ndarray, np.ndarray]], order: list[str]) -> Arrays:
    missing = [name for name in order if name not in batches]
    if missing:
        raise CorruptData(f"missing {', '.join(missing)}")
    arrays: Arrays = {}
    for split in SPLITS:
        names = [name for name in order if name.startswith("test") == (split == "test")]
        arrays[f"x_{split}"] = np.concatenate([batches[name][0] for name in names])
        arrays[f"y_{split}"] = np.concatenate([batches[name][1] for name in names])
    return arrays

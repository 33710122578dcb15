"""Downloads the official files, with resume and checksum."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vfl.data.datasets import DATASETS, data_root
from vfl.data.leaf import MADE_BY_LEAF, how_to_make
from vfl.errors import UsageError, unknown

Progress = Callable[[str, int, int | None], None]
"""Called after each block with the file's name, its bytes so far, and its total bytes where the server tells."""

_BLOCK = 1 << 18
_TIMEOUT = 30  # seconds without a byte
_TRIES = 3  # connections in a row that bring nothing new before an address is given up


class Source(NamedTuple):
    """Where a data set's files come from."""

    addresses: tuple[str, ...]  # folders, tried in this order
    files: dict[str, str]  # name → md5


_IDX_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)

SOURCES: dict[str, Source] = {
    "mnist": Source(  # the mirror first: the original address often refuses
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        dict(zip(_IDX_NAMES, _MNIST_MD5, strict=True)),
    ),
    "fashion_mnist": Source(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        dict(zip(_IDX_NAMES, _FASHION_MD5, strict=True)),
    ),
    "cifar10": Source(
        ("https://www.cs.toronto.edu/~kriz/",),
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
    "tiny_shakespeare": Source(
        ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",),
        {"input.txt": "6fb458f1232090904fb40fe944165e91"},
    ),
}
"""The data sets that can be downloaded."""


class _LostError(Exception):
    """The connection failed or ended early; trying again may help."""


def get(
    name: str, root: str | Path | None = None, base_url: str | None = None, progress: Progress | None = None
) -> Path:
    """Downloads a data set of `SOURCES` into its folder under the root (as in `data_root`) and returns that folder.

    Files already there with the right md5 stay. A file grows as FILE.part, from which a later call goes on where the
    server allows it, and takes its name only with the right md5; with a wrong one it is removed. `base_url` stands in
    for the official addresses. Raises UsageError for an unknown name, a wrong checksum, and addresses that cannot be
    reached or refuse.
    """
    if name in MADE_BY_LEAF:
        raise UsageError(f"{name} cannot be downloaded ready-made; {how_to_make(name)}")
    if name in DATASETS and name not in SOURCES:
        raise UsageError(f"{name} needs no download: it comes with vfl")
    if name not in SOURCES:
        raise unknown("data set to download", name, SOURCES)
    addresses, files = SOURCES[name]
    addresses = (base_url,) if base_url else addresses
    folder = data_root(root) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}); choose another --data-root") from None
    for file, md5 in files.items():
        target = folder / file
        if not target.is_file() or _md5(target) != md5:
            _download([f"{address.rstrip('/')}/{file}" for address in addresses], target, md5, progress)
    return folder


def _download(urls: list[str], target: Path, md5: str, progress: Progress | None) -> None:
    """`target` from the first of the addresses that gives it."""
    part = target.with_name(target.name + ".part")
    reasons: list[str] = []
    for url in urls:
        tries, best = 0, _size(part)
        while tries < _TRIES:
            try:
                _fetch(url, part, progress)
            except _LostError as error:
                tries = 0 if _size(part) > best else tries + 1
                best = max(best, _size(part))
                if tries == _TRIES:
                    kept = f"; {part.name} keeps {_size(part):,} bytes, run again to go on" if _size(part) else ""
                    reasons.append(f"{url}: {error}{kept}")
            except urllib.error.HTTPError as error:
                error.close()
                reasons.append(f"{url}: the server answers {error.code} {error.reason}")
                break
            except OSError as error:
                raise UsageError(f"{part} cannot be written ({error.strerror}); choose another --data-root") from None
            else:
                found = _md5(part)
                if found != md5:
                    part.unlink()
                    raise UsageError(
                        f"{url} gave a file with the md5 {found} instead of {md5}; it was removed: "
                        "run again, or get the file from elsewhere"
                    )
                part.replace(target)
                return
    raise UsageError(f"{target.name} cannot be downloaded ({'; '.join(reasons)})")


def _fetch(url: str, part: Path, progress: Progress | None) -> None:
    """One connection: appends to `part` from where it ends, or writes it anew where the server sends the whole."""
    start = _size(part)
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing lies beyond what we have: a whole file, or a wrong one
            error.close()
            part.unlink()
            _fetch(url, part, progress)
            return
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _LostError(_reason(error)) from None
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        done = start
        with part.open("ab" if start else "wb") as file:
            while block := _read(response):
                file.write(block)
                done += len(block)
                if progress:
                    progress(part.name.removesuffix(".part"), done, total)
        if total is not None and done < total:
            raise _LostError(f"the connection ended after {done:,} of {total:,} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _LostError(_reason(error)) from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

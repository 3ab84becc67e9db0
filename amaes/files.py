"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes its name only once written: nothing half-written is ever seen under `path`.

    Args:
        path: final name; its folder is made.
        sync: also survive a power failure (fsync).

    Raises:
        OSError: the disk is full, say; nothing was written under `path`, and what stood there is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a file of its own: what a link there points to is left alone
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        cause = _cause(error)
        if cause is None:
            raise
        explained = OSError(f"{path}: could not be written ({cause.strerror}); what was there before is untouched")
        explained.errno = cause.errno
        raise explained from error


@contextmanager
def locked(folder: Path, message: str, *, name: str = ".lock", shared: bool = False) -> Iterator[None]:
    """Keep a second process out of a folder, where the file system knows locks.

    Args:
        folder: must exist.
        message: what to tell the second.
        name: of the lock's file; locks of different names do not concern each other.
        shared: keep out only those that do not share.

    Raises:
        ValueError: another process is in it, with `message`.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / name).open("a+") as file:  # network file systems want it readable to be shared
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: {message}") from None
        except OSError:  # no locks on this file system
            pass
        yield


def _cause(error: BaseException) -> OSError | None:
    """The OSError behind an exception: torch.save, for one, reports a failed write as a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: str | Path) -> object:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands deep
        raise ValueError(f"{path}: not JSON ({str(error)[:160]})") from None

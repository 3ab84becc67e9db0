"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes its name only once written: nothing half-written is ever seen under `path`.

    What is no regular file (/dev/null, a pipe, the terminal) is not replaced: it gets the whole content at the end.

    Args:
        path: final name; its folder is made.
        sync: also survive a power failure (fsync).

    Raises:
        OSError: the disk is full, say; nothing was written under `path`, and what stood there is untouched.
    """
    path = Path(path)
    in_place = _is_written_in_place(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if in_place:
            content = io.BytesIO()
            yield content
            _write_in_place(path, content.getbuffer())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a file of its own: what a link there points to is left alone
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if not in_place:
            with suppress(OSError):
                temporary.unlink()
        cause = _cause(error)
        if cause is None:
            raise
        untouched = "" if in_place else "; what was there before is untouched"
        explained = OSError(f"{path}: could not be written ({cause.strerror or cause}){untouched}")
        explained.errno = cause.errno
        raise explained from error


def _is_written_in_place(path: Path) -> bool:
    """Whether `path` is a device, a pipe, a folder, or a name of what this process has open (/dev/stdout)."""
    with suppress(OSError):  # of a folder that may not be looked into; writing says so
        return _open_descriptor(path) is not None or (path.exists() and not path.is_file())
    return False


def _open_descriptor(path: Path) -> int | None:
    """The number of the open file that /dev/stdout, /dev/stderr or /dev/fd/N stands for."""
    name = str(path.absolute())
    if name in ("/dev/stdout", "/dev/stderr"):
        return 1 if name == "/dev/stdout" else 2
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", name)
    return int(match[1]) if match else None


def _write_in_place(path: Path, content: memoryview) -> None:
    """Write onto what is there; of an open file at its position, so that later lines come after it."""
    descriptor = _open_descriptor(path)
    with path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)  # a pipe waits for its reader


def is_disk_full(error: BaseException) -> bool:
    """The error says that no space is left, on the disk or of a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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


def hold(folder: Path, message: str, *, name: str, shared: bool = False) -> BinaryIO | None:
    """Keep other processes out of a folder for as long as this process lives, or until the returned file is closed.

    Unlike `locked`, processes that this one forks do not hold the lock: one that outlives it is in nobody's way.

    Args:
        folder: is made where it is not there.
        message: what to tell a second process; who holds the lock, and since when, is added.
        name: of the lock's file.
        shared: keep out only those that do not share.

    Returns:
        The lock's file, to be kept; None where the system knows no such locks.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / name).open("a+b")
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip()
        file.close()
        raise ValueError(f"{folder}: {message}" + (f" ({holder})" if holder.isprintable() and holder else "")) from None
    except OSError:  # no locks on this file system
        pass
    file.truncate(0)  # who held it before has nothing to do with who holds it now
    if not shared:
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        file.write(f"process {os.getpid()} on {platform.node()} since {since}".encode())
        file.flush()
    return file


def _cause(error: BaseException) -> OSError | None:
    """The OSError behind an exception: torch.save, for one, reports a failed write as a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def first_line(error: BaseException, limit: int = 400) -> str:
    """What an error says first, for a line of ours: whole, as a remedy may stand at its end, unless it is a page."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return text if len(text) <= limit else f"{text[:limit].rsplit(' ', 1)[0]} ..."


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
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({first_line(error)})") from None


def parse_json(text: str) -> object:
    """What a text of JSON says; ValueError where it is none, or is nested thousands deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None

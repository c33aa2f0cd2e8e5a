"""Atomic file writes, and reading of text and JSON that reports damaged files."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Write errors that a retry does not cure: disk full, quota, file too large, read-only file system.
PERMANENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

FAILURE_FILE = "failure.txt"  # in the folder of a failed run: the reason in one line, then a traceback


class DamagedFile(ValueError):
    """A file exists but its content is damaged. The message names the file."""


def error_reason(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type; "missing key 'epoch'" for KeyError."""
    if isinstance(error, KeyError):
        return f"missing key {error}"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def sync_folder(folder: Path) -> None:
    """fsync `folder`, so that renames inside it survive a power failure. Not all file systems can do this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def retry_once(write: Callable[[], None]) -> None:
    """Call `write`. Retry once after 1 s if it fails with a temporary error, such as one of a network disk."""
    try:
        write()
    except OSError as error:
        if error.errno in PERMANENT_ERRORS:
            raise
        print(f"warning: {error}; retrying once", file=sys.stderr)
        time.sleep(1)
        write()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically: readers see either the old or the new content. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")

    def write() -> None:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    retry_once(write)


def append_line(path: Path, line: str) -> None:
    """Append a line to `path` and fsync. A failed write leaves the file unchanged. Raises OSError."""

    def append() -> None:
        data = line.encode() + b"\n"
        with open(path, "ab", buffering=0) as file:
            length = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), length)
                raise

    retry_once(append)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically. Raises ValueError for NaN and infinity, which are not valid JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, [] if the file does not exist.

    An incomplete last line, left by a killed process, is ignored. Raises DamagedFile with the line number if another
    line is not a JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    objects = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            if line:
                objects.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise DamagedFile(f"{path}, line {number}: not a JSON object") from None
    return objects


def read_text_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, without their ends (LF or CRLF) and without empty lines at the end.

    A byte-order mark is ignored. Other line separators of Unicode do not end a line. Raises OSError, or DamagedFile if
    the file is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is not a UTF-8 text (byte {error.start}): save it as UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises FileNotFoundError, or DamagedFile if it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{path} is not valid JSON ({error})") from None

"""Files that are either whole or absent: atomic writing, and reading that notices damage."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # errors of a disk that waiting does not mend


class DamagedFile(ValueError):
    """A file is there but cannot be trusted; the message names it."""


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retry_once(write: Callable[[], None]) -> None:
    """Do it; after an error that may pass (a network disk's, not a full one's) wait a second and try again, once."""
    try:
        write()
    except OSError as error:
        if error.errno in FULL:
            raise
        print(f"warning: {error}; trying once more", file=sys.stderr)
        time.sleep(1)
        write()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically: readers see the old content or the new, never a part. Raises OSError."""
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
    """Add a line to `path`, flushed to the disk; a write that fails leaves no part of it. Raises OSError."""

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
    """Atomic, UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Atomic; NaN and infinity are refused with a ValueError, so that every reader can parse the file."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] where it is absent; a half last line (a kill in the write) is left out.

    Raises DamagedFile where any other line is no JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        return [dict(json.loads(line)) for line in lines[:-1] if line]
    except (ValueError, TypeError):
        raise DamagedFile(f"{path} holds a line that is not a JSON object") from None


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError, or DamagedFile where the file is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{path} is not valid JSON ({error})") from None

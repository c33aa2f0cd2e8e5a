"""Download a file. An interrupted download continues where it was cut."""

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from common.files import DamagedFile

BLOCK_BYTES = 2**20
TIMEOUT = 60  # seconds without data


def download(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path`. Until it is complete, the file is called `path`.part; a new call continues it.

    Raises OSError if the download fails or is cut, DamagedFile if the complete file has another MD5 checksum; it is
    deleted.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        complete = fetch(url, part)
    except HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
    with open(complete, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5:
            complete.unlink()
            raise DamagedFile(f"{url} is not the expected file (its MD5 checksum differs)")
    os.replace(complete, path)
    part.unlink(missing_ok=True)


def fetch(url: str, part: Path) -> Path:
    """Download the rest of `url` to `part`, or the whole file to `part`.whole if the server cannot send the rest.

    Returns the file that is complete. Raises OSError or HTTPException.
    """
    start = part.stat().st_size if part.exists() else 0
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # no bytes after `start`: the file is complete
            return part
        raise
    if start and response.status != 206:
        start, part = 0, part.with_name(f"{part.name}.whole")
    length = response.headers["Content-Length"]
    total = start + int(length) if length else None
    with (
        response,
        open(part, "ab" if start else "wb") as file,
        tqdm(desc=part.name, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while block := response.read(BLOCK_BYTES):
            file.write(block)
            bar.update(len(block))
    if total and part.stat().st_size < total:
        raise OSError(f"cut after {part.stat().st_size} of {total} bytes")
    return part

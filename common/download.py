"""Download a file. An interrupted download continues where it was cut."""

import hashlib
import os
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
    start = part.stat().st_size if part.exists() else 0
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:  # no bytes after `start`: the file is complete
            raise
    else:
        start = start if response.status == 206 else 0  # other servers send the file from its beginning
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        with (
            response,
            open(part, "ab" if start else "wb") as file,
            tqdm(desc=path.name, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                bar.update(len(block))
        if total and part.stat().st_size < total:
            raise OSError(f"cut after {part.stat().st_size} of {total} bytes")
    with open(part, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5:
            part.unlink()
            raise DamagedFile(f"{url} is not the expected file (its MD5 checksum differs)")
    os.replace(part, path)

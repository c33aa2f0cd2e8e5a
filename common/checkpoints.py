"""Checkpoints: tensors and plain values in one file, written atomically, checked and never executed when read."""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from common.files import Damaged, write_bytes


def save(path: Path, value: Any) -> None:
    """torch.save, atomically. `value`: tensors, numbers, strings, lists and dicts only."""
    buffer = BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """torch.load that executes nothing from the file and checks each part's checksum first.

    Raises FileNotFoundError, or Damaged where the file is cut, altered or holds more than plain data.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums
            if archive.testzip() is not None:
                raise Damaged(f"{path} is damaged: a checksum does not match")
        return torch.load(path, map_location=device, weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # torch raises many kinds for a cut or hostile file
        raise Damaged(
            f"{path} cannot be read ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from None

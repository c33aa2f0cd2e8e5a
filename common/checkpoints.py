"""Checkpoints: tensors and plain values in one file, written atomically, checked and never executed when read."""

import hashlib
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.exits import stop
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


def fit(model: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """load_state_dict; stops (exit 2) with the first names that are missing, extra or of another shape."""
    own = model.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        stop(f"{source} does not fit this network: {len(wrong)} tensors missing, extra or of other shape, the first: "
             f"{', '.join(wrong[:3])}")  # fmt: skip
    model.load_state_dict(state)


def sha256(*tensors: Tensor) -> str:
    """Hex digest of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()

"""Checkpoints: tensors and plain values in one file, written atomically, checked and never executed when read."""

import hashlib
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import fail
from common.files import DamagedFile, write_bytes

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
         "U8": "u1", "BOOL": "?"}  # fmt: skip
LONGEST = 100_000_000  # bytes of a header that is still believed


def save(path: Path, value: Any) -> None:
    """torch.save, atomically. `value`: tensors, numbers, strings, lists and dicts only."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """torch.load that executes nothing from the file and checks each part's checksum first.

    Raises FileNotFoundError, or DamagedFile where the file is cut, altered or holds more than plain data.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums
            if archive.testzip() is not None:
                raise DamagedFile(f"{path} is damaged: a checksum does not match")
        return torch.load(path, map_location=device, weights_only=True)
    except DamagedFile:
        raise
    except Exception as error:  # torch raises many kinds for a cut or hostile file
        raise DamagedFile(
            f"{path} cannot be read ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from None


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file by name; bfloat16 comes as float32. Raises OSError, or DamagedFile.

    The file: 8 bytes with the header's length, a JSON header with type, shape and place of every array, the numbers.
    """
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END) - 8
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size, LONGEST):
            raise DamagedFile(f"{path} is cut off, or no safetensors file: its header does not fit into it")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            parts = {name: (one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for name, one in header.items()}
            fits = max((end for *_, end in parts.values()), default=0) == size - length and all(
                start >= 0 and np.dtype(TYPES[kind]).itemsize * math.prod(shape) == end - start
                for kind, shape, start, end in parts.values()
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedFile(f"{path} has a header that cannot be read ({type(error).__name__}: {error})") from None
        if not fits:
            raise DamagedFile(f"{path} is cut off or damaged: its numbers do not fit its header")
        arrays = {}
        for name, (kind, shape, start, _) in parts.items():
            file.seek(8 + length + start)
            array = np.fromfile(file, TYPES[kind], math.prod(shape)).reshape(shape)
            arrays[name] = (array.astype("<u4") << 16).view("<f4") if kind == "BF16" else array
    return arrays


def fit(model: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """load_state_dict; stops (exit 2) with the first names that are missing, extra or of another shape."""
    own = model.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        fail(f"{source} does not fit this network: {len(wrong)} tensors missing, extra or of other shape, the first: "
             f"{', '.join(wrong[:3])}")  # fmt: skip
    model.load_state_dict(state)


def sha256(*tensors: Tensor) -> str:
    """Hex digest of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()

"""Checkpoints: tensors and plain values in one file, written atomically and verified when read.

Reading never executes code from the file.
"""

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
from common.files import DamagedFile, error_reason, write_bytes

SAFETENSORS_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # a safetensors file with a longer header counts as damaged


def save(path: Path, value: Any) -> None:
    """Write `value` with torch.save, atomically. It may contain only tensors, numbers, strings, lists and dicts."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """Load a file written by `save`: tensors and plain values only, after verifying the checksums.

    Raises FileNotFoundError, or DamagedFile if the file is truncated, altered or contains other types of objects.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if archive.testzip() is not None:
                raise DamagedFile(f"{path} is damaged: a checksum does not match")
        return torch.load(path, map_location=device, weights_only=True)
    except DamagedFile:
        raise
    except Exception as error:  # torch raises many types of exception for a truncated or malicious file
        raise DamagedFile(f"{path} cannot be read ({error_reason(error)})") from None


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .safetensors file by name; bfloat16 is converted to float32.

    File format: the header's length in 8 bytes, a JSON header with dtype, shape and byte offsets of each array, then
    the data. Raises OSError, or DamagedFile if the file is truncated or its header is invalid.
    """
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END) - 8
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size, MAX_HEADER_BYTES):
            raise DamagedFile(f"{path} is cut off or not a safetensors file: its header is longer than the file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries, last, consistent = {}, 0, True
            for name, entry in header.items():
                dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                array_bytes = np.dtype(SAFETENSORS_DTYPES[dtype]).itemsize * math.prod(shape)
                consistent &= start >= 0 and array_bytes == end - start
                entries[name], last = (dtype, shape, start), max(last, end)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedFile(f"{path} has a header that cannot be read ({error_reason(error)})") from None
        if not consistent or last != size - length:
            raise DamagedFile(f"{path} is cut off or damaged: its data do not fit its header")
        arrays = {}
        for name, (dtype, shape, start) in entries.items():
            file.seek(8 + length + start)
            array = np.fromfile(file, SAFETENSORS_DTYPES[dtype], math.prod(shape)).reshape(shape)
            # A bfloat16 number is the upper half of a float32.
            arrays[name] = (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array
    return arrays


def load_weights(model: nn.Module, state: dict[str, Tensor], source: Path | str, network: str = "this network") -> None:
    """Call model.load_state_dict. Exits with code 2 if tensors are missing, unexpected or of another shape.

    `source` is the file or folder of `state`. The message says that it does not fit `network`, and names the first
    tensor of each kind.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misshaped = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of its {len(expected)} tensors are missing, first {missing[0]}")
    if unexpected:
        problems.append(f"{len(unexpected)} are unexpected, first {unexpected[0]}")
    if misshaped:
        name = misshaped[0]
        shapes = f"file {tuple(state[name].shape)}, network {tuple(expected[name].shape)}"
        problems.append(f"{len(misshaped)} have another shape, first {name}: {shapes}")
    if problems:
        fail(f"{source} does not fit {network} ({'; '.join(problems)}): give weights of {network}")
    model.load_state_dict(state)


def sha256(*tensors: Tensor) -> str:
    """Return the hex digest of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()

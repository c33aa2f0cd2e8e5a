"""Read weight files of other programs, for all papers. Code in a file is never executed."""

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import checkpoints
from common.cli import fail
from common.files import DamagedFile

# Top-level entries under which a file may contain the state dict.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
MAX_ABS_WEIGHT = 1e15  # larger values indicate a damaged file, such as a flipped exponent bit


class Weights(NamedTuple):
    """The weights of a file by name, on the CPU, and the file's other top-level entries."""

    tensors: dict[str, Tensor]
    other: dict[str, Any]


def read_weights(
    path: Path,
    flag: str,
    expected: str,
    state_dict_keys: Sequence[str] = (),
    prefixes: Sequence[str] = (),
    safe: Sequence[type] = (),
) -> Weights:
    """Read a .safetensors file or a file of torch.save (zip or legacy format).

    The weights are the file's top-level dictionary, or are nested under one of STATE_DICT_KEYS or `state_dict_keys`.
    PREFIXES and `prefixes` are removed if all names have them. `safe`: classes allowed by
    torch.serialization.safe_globals. `flag` and `expected` ("a ResNet-50 of SimSiam") are used in the messages. Exits
    with code 2 if the file is missing, damaged or of another format, or if it contains other objects, no tensors, or
    values that are NaN, infinite or above MAX_ABS_WEIGHT (1e15).
    """
    content = _read(path, flag, expected, safe)
    if not isinstance(content, Mapping):
        fail(f"{flag} {path} contains a {type(content).__name__} instead of named tensors: give {expected}")
    keys = (*state_dict_keys, *STATE_DICT_KEYS)
    key = next((name for name in keys if isinstance(content.get(name), Mapping)), None)
    state: Mapping = content if key is None else content[key]
    tensors = tensors_of(state)
    if not tensors:
        fail(
            f"{flag} {path} contains no tensors, neither at the top level nor under {', '.join(keys)}: give {expected}"
        )
    for name, tensor in tensors.items():
        values = tensor.float() if tensor.is_floating_point() else torch.zeros(1)
        if not values.isfinite().all() or (values.numel() and values.abs().max() > MAX_ABS_WEIGHT):
            fail(f"{flag} {path}: {name} contains NaN, infinity or values above {MAX_ABS_WEIGHT:g} (damaged file or "
                 f"diverged training): give {expected}")  # fmt: skip
    removed = True
    while removed:
        removed = False
        for prefix in (*PREFIXES, *prefixes):
            if all(name.startswith(prefix) and name != prefix for name in tensors):
                tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
                removed = True
    used = tensors_of(content) if key is None else {key}
    other = {str(name): value for name, value in content.items() if name not in used}
    return Weights(tensors, other)


def tensors_of(state: Mapping) -> dict[str, Tensor]:
    """Return the entries of a state dict that are tensors."""
    return {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _read(path: Path, flag: str, expected: str, safe: Sequence[type]) -> Any:
    """Load the file. The format is detected from its first bytes, not from the suffix."""
    if path.is_dir():
        fail(f"{flag} {path} is a folder: give {expected}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
                if damaged := archive.testzip():
                    raise DamagedFile(f"{path} is damaged (the checksum of {damaged} does not match)")
        elif start[8:] == b"{":
            return {name: torch.from_numpy(array) for name, array in checkpoints.read_safetensors(path).items()}
        elif not start.startswith(b"\x80"):
            fail(f"{flag} {path} is neither a .safetensors file nor a file of torch.save: give {expected}")
        with torch.serialization.safe_globals(list(safe)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about protocols other than its default
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{flag} {path} does not exist: give {expected}")
    except OSError as error:
        fail(f"{flag} {path} cannot be read ({error.strerror}): give {expected}")
    except DamagedFile as error:
        fail(f"{flag} {error}: give {expected}")
    except Exception as error:
        # torch raises many types of exception for a damaged or malicious file. Their text is long and contains terminal
        # escapes, so only the name of a forbidden class is taken from it.
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            fail(f"{flag} {path} contains Python objects ({forbidden[1]}), which are not unpickled for safety: save "
                 "only the state_dict")  # fmt: skip
        fail(f"{flag} {path} is cut off, damaged or not a file of torch.save: give {expected}")


def recorded_accuracy(weights: Weights, flag: str, path: Path) -> float | None:
    """Return `weights.other['accuracy']` in percent, or None.

    A value <= 1 counts as a fraction and is multiplied by 100, except in files of our own runs (those with
    `arguments`), which already store percent. Exits with code 2 if it is not a number from 0 to 100.
    """
    if "accuracy" not in weights.other or weights.other["accuracy"] is None:
        return None
    value = weights.other["accuracy"]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        fail(
            f"{flag} {path}: accuracy {str(value)[:40]!r} is not a percentage (0 to 100): correct or delete this entry"
        )
    return 100.0 * value if value <= 1 and "arguments" not in weights.other else float(value)

"""Read weight files that other programs wrote. One reader for all papers: nothing in a file is executed."""

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

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network")  # keys that hold the weights
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
LARGEST = 1e15  # no trained weight is larger; a flipped exponent bit is


class Weights(NamedTuple):
    """The weights of a file by name, on the CPU, and the other entries next to them."""

    tensors: dict[str, Tensor]
    other: dict[str, Any]


def read_weights(
    path: Path,
    flag: str,
    expected: str,
    wrappers: Sequence[str] = (),
    prefixes: Sequence[str] = (),
    safe: Sequence[type] = (),
) -> Weights:
    """Read a .safetensors file or a file of torch.save (zip or legacy format).

    The weights may be the file's dictionary or stand under one of WRAPPERS or `wrappers`. PREFIXES and `prefixes` are
    removed from the names where all names have them. `safe` are classes that torch may build beside tensors.
    `flag` and `expected` ("a ResNet-50 of SimSiam") are for the messages. Exits with code 2 where the file is absent,
    damaged, of another format, holds other objects, no tensors, or a number that is not finite or absurdly large.
    """
    content = _read(path, flag, expected, safe)
    if not isinstance(content, Mapping):
        fail(f"{flag} {path} holds a {type(content).__name__} instead of named tensors: give {expected}")
    wrapper = next((name for name in (*wrappers, *WRAPPERS) if isinstance(content.get(name), Mapping)), None)
    state: Mapping = content if wrapper is None else content[wrapper]
    tensors = tensors_of(state)
    if not tensors:
        fail(f"{flag} {path} holds no tensors, neither directly nor under {', '.join((*wrappers, *WRAPPERS))}: "
             f"give {expected}")  # fmt: skip
    for name, tensor in tensors.items():
        values = tensor.float() if tensor.is_floating_point() else torch.zeros(1)
        if not values.isfinite().all() or (values.numel() and values.abs().max() > LARGEST):
            fail(f"{flag} {path}: {name} holds a number that is NaN, infinite or above {LARGEST:g}: the file is "
                 "damaged or its training diverged")  # fmt: skip
    removed = True
    while removed:
        removed = False
        for prefix in (*PREFIXES, *prefixes):
            if all(name.startswith(prefix) and name != prefix for name in tensors):
                tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
                removed = True
    used = tensors_of(content) if wrapper is None else {wrapper}
    other = {str(key): value for key, value in content.items() if key not in used}
    return Weights(tensors, other)


def tensors_of(state: Mapping) -> dict[str, Tensor]:
    """Return the entries of a state dict that are tensors."""
    return {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _read(path: Path, flag: str, expected: str, safe: Sequence[type]) -> Any:
    """Return the content of the file, by its first bytes and not by its suffix."""
    if path.is_dir():
        fail(f"{flag} {path} is a folder: give {expected}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
                if damaged := archive.testzip():
                    raise DamagedFile(f"{path} is damaged: the checksum of {damaged} does not match")
        elif start[8:] == b"{":
            return {name: torch.from_numpy(array) for name, array in checkpoints.read_safetensors(path).items()}
        elif not start.startswith(b"\x80"):
            fail(f"{flag} {path} is neither a .safetensors file nor one of torch.save: give {expected}")
        with torch.serialization.safe_globals(list(safe)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of protocols that it does not write itself
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{flag} {path}: no such file: give {expected}")
    except OSError as error:
        fail(f"{flag} {path} cannot be read ({error.strerror})")
    except DamagedFile as error:
        fail(f"{flag}: {error}")
    except Exception as error:
        # torch raises many types for a damaged or hostile file, and its text is long and has terminal escapes. Only the
        # name of an object that is not a tensor is taken from it.
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            fail(f"{flag} {path} holds Python objects ({forbidden[1]}) besides tensors, and nothing from a file is "
                 "executed: save its state_dict alone")  # fmt: skip
        fail(f"{flag} {path} is cut off, damaged or not a file of torch.save: give {expected}")


def recorded_accuracy(weights: Weights, flag: str, path: Path) -> float | None:
    """Return the `accuracy` that stands next to the weights in percent, or None. A share up to 1 becomes percent.

    Exits with code 2 where it is not a number between 0 and 100.
    """
    if "accuracy" not in weights.other or weights.other["accuracy"] is None:
        return None
    value = weights.other["accuracy"]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        fail(f"{flag} {path}: its `accuracy` is {str(value)[:40]!r}, not a number of percent between 0 and 100")
    return 100.0 * value if value <= 1 and "arguments" not in weights.other else float(value)

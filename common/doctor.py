"""What this machine has, and what to do about what is missing: `make doctor`."""

import os
import platform
import shutil
import sys
from pathlib import Path

import torch
import torchvision

from common import cli

DATA = {
    "CIFAR-10 (SimSiam, ConMIM)": "cifar-10-batches-py",
    "CIFAR-100 (CoCoRD)": "cifar-100-python",
    "MeSH concepts (BSA)": "mesh-minilm.npy",
}


def findings(data: Path) -> list[tuple[str, str]]:
    """Pairs of (what was found, what to do about it or an empty string)."""
    found = [
        (f"Python {platform.python_version()} at {sys.prefix}", ""),
        (f"torch {torch.__version__}, torchvision {torchvision.__version__}", ""),
        (f"{os.cpu_count()} CPU cores, {shutil.disk_usage('.').free / 2**30:.0f} GiB of disk free", ""),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            advice = "" if facts.major >= 8 else "it has no fast bfloat16: give EXTRA='--precision float32'"
            found.append((f"cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB", advice))
    elif torch.version.cuda is None:
        found.append(("a torch built without CUDA", "for a GPU install the CUDA build; make demo needs none"))
    else:
        advice = "check nvidia-smi and that the driver is as new as torch wants; make demo needs no GPU"
        found.append((f"no CUDA GPU (torch was built for CUDA {torch.version.cuda})", advice))
    for name, file in DATA.items():
        there = (data / file).exists()
        found.append((f"{name}: {'' if there else 'not '}in {data}", "" if there else "make data"))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    for what, advice in findings(parser.parse_args(argv).data):
        print(f"{what}: {advice}" if advice else what)


if __name__ == "__main__":
    main()

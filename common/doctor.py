"""Report on this machine: Python, torch, GPUs, data sets, and remedies for what is missing (`make doctor`)."""

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
    "MNIST-5k (image papers, demo)": "mnist5k.pt",
    "MeSH concepts (BSA)": "mesh-minilm.npy",
}


def findings(data: Path) -> list[tuple[str, str]]:
    """Return pairs of (finding, remedy). The remedy is empty if nothing is missing."""
    pairs = [
        (f"Python {platform.python_version()} at {sys.prefix}", ""),
        (f"torch {torch.__version__}, torchvision {torchvision.__version__}", ""),
        (f"{os.cpu_count()} CPU cores, {shutil.disk_usage('.').free / 2**30:.0f} GiB of free disk", ""),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            remedy = "" if gpu.major >= 8 else "no fast bfloat16: use EXTRA='--precision float32'"
            pairs.append((f"cuda:{index} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB", remedy))
    elif torch.version.cuda is None:
        pairs.append(("torch was built without CUDA", "to use a GPU, install a CUDA build; make demo needs no GPU"))
    else:
        remedy = "run nvidia-smi and check that the driver supports this CUDA version; make demo needs no GPU"
        pairs.append((f"no CUDA GPU (torch was built for CUDA {torch.version.cuda})", remedy))
    for name, file in DATA.items():
        if (data / file).exists():
            pairs.append((f"{name}: in {data}", ""))
        else:
            pairs.append((f"{name}: not in {data}", "run make data"))
    return pairs


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of data sets")
    for finding, remedy in findings(parser.parse_args(argv).data):
        print(f"{finding}: {remedy}" if remedy else finding)


if __name__ == "__main__":
    main()

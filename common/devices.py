"""Device selection, mixed precision, distributed ranks and memory errors."""

import atexit
import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.cli import RUNS_ON_THIS_GPU, SCALES, Parser, fail


def select_device(name: str, scale: str, distributed: bool = False) -> torch.device:
    """Return the device for `--device NAME` and set the cuDNN options. Under torchrun `cuda` is this rank's GPU.

    Exits with code 2 if the device does not exist, if `auto` finds no GPU at gpu or paper scale, or if torchrun starts
    several processes of a script that is not `distributed`.
    """
    if not distributed and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        fail("this script runs in a single process: start it without torchrun (WORLD_SIZE is set)")
    cuda = torch.cuda.is_available()
    if name == "auto" and not cuda and scale != "demo":
        fail(
            f"scale {scale} needs a CUDA GPU, but none was found: use --device cpu (make: DEVICE=cpu), which is very "
            "slow, or train at scale demo (make: SCALE=demo)"
        )
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "mps":
        fail("--device mps is not supported, because statistics are computed in float64: use --device cpu")
    if device.type not in ("cpu", "cuda"):
        fail(f"invalid --device '{name}': give auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= (torch.cuda.device_count() if cuda else 0):
            fail(f"--device {name} does not exist (no such CUDA GPU): give another GPU, or --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    # Disable TF32: its 10-bit mantissa is too coarse for the collapse metrics.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # input shapes are fixed
    # On Hopper, cuDNN attention may round the dropout probability to multiples of 1/16 (pytorch pull request 174245).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a CPU tensor to `device` without host-device synchronisation (pinned memory, non-blocking)."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether a run trains in bfloat16: with `--precision bfloat16`, and with `auto` on CUDA.

    `auto` excludes CPUs: without bfloat16 instructions autocast is two to five times slower.
    """
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return a bfloat16 autocast context, disabled unless `uses_bfloat16`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(precision, device))


def init_process_group(name: str, device: torch.device) -> tuple[int, int]:
    """Join torchrun's process group. Returns (rank, world size), or (0, 1) without torchrun.

    `name` is the value of --device. With `cuda` each rank has its own GPU and the backend is NCCL. With `cuda:N` all
    ranks share one GPU, which NCCL does not support: the backend is gloo, as on CPUs.
    """
    if "RANK" not in os.environ:
        return 0, 1
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        fail(f"RANK is set in the environment, but not {' and '.join(missing)}: start with torchrun, or unset RANK")
    if not dist.is_initialized():
        atexit.register(destroy_process_group)
        gpu_per_rank = device.type == "cuda" and ":" not in name
        dist.init_process_group("nccl" if gpu_per_rank else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size()


def distribute(model: nn.Module, device: torch.device, synchronised: bool = True) -> nn.Module:
    """Wrap `model` in DistributedDataParallel, on CUDA with SyncBatchNorm if `synchronised`.

    Returns `model` itself without a process group.
    """
    if not dist.is_initialized():
        return model
    if device.type == "cuda" and synchronised:  # SyncBatchNorm does not exist for CPUs
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def rank_and_world() -> tuple[int, int]:
    """Return (rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rows_of_rank(batch: int) -> slice:
    """Return the slice of a global batch of size `batch` that this rank processes."""
    rank, world = rank_and_world()
    return slice(rank * batch // world, (rank + 1) * batch // world)


def barrier() -> None:
    """Wait for all ranks. Without a process group, do nothing."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of `value` over all ranks, on every rank. Works in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def finite_on_all_ranks(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all floating-point `tensors` are finite on all ranks. Synchronises host and device once."""
    finite = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return bool(mean_over_ranks(torch.stack(finite).all().float()) == 1)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0 to all ranks: plain batch norms have running statistics per rank."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate the rows (n, ...) of all ranks in rank order, on every rank. n may differ between ranks."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(counts).max())
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    blocks = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(blocks, padded)
    return torch.cat([block[: int(count)] for block, count in zip(blocks, counts, strict=True)])


def destroy_process_group() -> None:
    """Destroy the process group. Without one, do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: allocated by torch on a GPU, resident set size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


OOM_MESSAGES = (  # of plain RuntimeErrors: of the CPU's allocator, and of CUDA and its libraries (cuBLAS, cuDNN)
    "can't allocate memory", "Storage size calculation overflowed", "CUDA error: out of memory", "STATUS_ALLOC_FAILED",
)  # fmt: skip


@contextmanager
def report_oom(device: torch.device, usage: str, remedy: str, precision: str = "bfloat16") -> Iterator[None]:
    """Context manager: if the `with` block runs out of memory, exit with code 2 and print one line.

    The line gives the peak memory, `usage` (what needs the memory, such as the batch size) and `remedy`. A run whose
    `precision` is not yet bfloat16 is told that this would help, too.
    """
    if not uses_bfloat16(precision, device):
        remedy += " or --precision bfloat16"
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_oom = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_oom and not any(text in str(error) for text in OOM_MESSAGES):
            raise
        peak = peak_memory(device) / 2**30
        others = int(os.environ.get(RUNS_ON_THIS_GPU, "1")) - 1
        shared = f", and up to {others} other runs share the GPU; change GPUS" if others else ""
        fail(f"out of memory on {device} with {usage} (peak {peak:.1f} GiB{shared}): {remedy}")


# On the same model of CPU a resumed run is bit-identical if these are equal (on a GPU the order of atomic additions
# varies).
# `Run.write_config` adds the precision.
ENVIRONMENT = ("torch", "device", "threads", "world", "precision")


def environment(device: torch.device) -> dict[str, object]:
    """Return the environment that must match when a run resumes: torch, device, threads, world size."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world": rank_and_world()[1],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with code 2 if the device that a run at this scale needs is not available."""
    parser = Parser(main.__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    scale = "at gpu and paper, --device auto requires a CUDA GPU"
    parser.add_argument("--scale", default="demo", choices=SCALES, help=scale)
    args = parser.parse_args(argv)
    select_device(args.device, args.scale)


if __name__ == "__main__":
    main()

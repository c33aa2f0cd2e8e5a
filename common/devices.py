"""Where a script computes: the device, its precision, and the ranks of a distributed run."""

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

from common.cli import SCALES, SHARED, Parser, fail


def select_device(name: str, scale: str) -> torch.device:
    """The device for `--device NAME`; sets what cuDNN may do on it. Under torchrun `cuda` is the GPU of this rank.

    Stops (exit 2) where it is absent, or where a GPU's work would fall on a CPU.
    """
    cuda = torch.cuda.is_available()
    if name == "auto" and not cuda and scale != "demo":
        fail(f"--scale {scale} wants a CUDA GPU and none was found: use --scale demo (make: SCALE=demo), "
             "or --device cpu (DEVICE=cpu) if you mean it")  # fmt: skip
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        fail(f"--device {name} is no device: use auto, cpu, cuda or cuda:1")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= (torch.cuda.device_count() if cuda else 0):
            fail(f"--device {name}: this machine shows no such CUDA GPU; use --device cpu --scale demo")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    # float32 means float32: cuDNN would round convolutions to TF32's 10 bits, which is enough to blur a collapse meter.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # shapes are fixed: let cuDNN time its algorithms once
    return device


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on `device`, without host-device synchronisation: to a GPU it is copied from pinned memory."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether a run trains under bfloat16: with `--precision bfloat16`, and with `auto` on CUDA.

    On a CPU without bfloat16 instructions autocast is two to five times slower, hence not in auto.
    """
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bfloat16 autocast where `uses_bfloat16`; else an autocast that does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(precision, device))


def start_ranks(name: str, device: torch.device) -> tuple[int, int]:
    """(rank, world): joins the process group until the script ends when torchrun started it, else (0, 1).

    `name` is the flag --device: `cuda` gives every rank a GPU of its own; `cuda:N` puts all ranks on one, where NCCL
    refuses to work and gloo takes its place.
    """
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        atexit.register(stop_ranks)
        own_gpu = device.type == "cuda" and ":" not in name
        dist.init_process_group("nccl" if own_gpu else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size()


def distribute(model: nn.Module, device: torch.device, synchronised: bool = True) -> nn.Module:
    """The model under DistributedDataParallel, on CUDA with `synchronised` batch norms; as it is on a single rank."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda" and synchronised:  # torch has no SyncBatchNorm for CPUs
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def rank_and_world() -> tuple[int, int]:
    """(rank, world) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rows_of_rank(batch: int) -> slice:
    """The rows of a global batch that this rank computes."""
    rank, world = rank_and_world()
    return slice(rank * batch // world, (rank + 1) * batch // world)


def barrier() -> None:
    """Wait for all ranks; nothing to do without a process group."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of `value` over the ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def finite_on_all_ranks(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every floating-point number of `tensors` is finite, on every rank. Asks the device once."""
    found = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return bool(mean_over_ranks(torch.stack(found).all().float()) == 1)


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0 (running statistics, which plain batch norms keep per rank)."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows (n, ...) of all ranks, rank after rank, on every rank; ranks may hold different n."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(counts).max())
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    blocks = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(blocks, padded)
    return torch.cat([block[: int(count)] for block, count in zip(blocks, counts, strict=True)])


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch held at most on the GPU, or the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def memory_for(device: torch.device, now: str, instead: str) -> Iterator[None]:
    """Answer a lack of memory with one sentence (exit 2): the peak, what was asked (`now`), what to try (`instead`)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch has no class of its own for a CPU's lack of memory
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        peak, others = peak_memory(device) / 2**30, int(os.environ.get(SHARED, "1")) - 1
        shared = f", while up to {others} other runs share the GPU (GPUS packs fewer)" if others else ""
        fail(f"out of memory on {device} with {now}: {peak:.1f} GiB held at most{shared}. {instead}")


def environment(device: torch.device) -> dict[str, object]:
    """What a run's numbers depend on beside its flags: a run goes on only where these are as at its beginning."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world": rank_and_world()[1],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m common.devices`: stop (exit 2) where a run at this scale would not find its device."""
    parser = Parser(main.__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scale", default="demo", choices=SCALES)
    args = parser.parse_args(argv)
    select_device(args.device, args.scale)


if __name__ == "__main__":
    main()

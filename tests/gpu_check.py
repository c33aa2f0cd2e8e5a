"""Does everything run on this GPU, does it agree with the CPU, how fast is it? `make gpu-check`

    make gpu-check PYTHON=python3                        # the aim is five minutes on an H100; never measured yet
    make gpu-check DEVICE=cpu                            # a dry run at tiny sizes: nothing about a GPU is shown
    make gpu-check PARTS="agreement sync" PAPERS=bsa     # some parts, some papers

Needs no network, no data and no git history: where CIFAR or the MeSH concepts are not in --data, random numbers of
their shape take their place. Writes report.md, report.json and log.txt (what the scripts print, and tracebacks) into
--report, after every case anew. A case that fails stops no other. Exit code 1 unless all that applies passed. On a GPU
what is not timed runs side by side, in --jobs processes.

agreement  equal weights and an equal batch on CPU and device, float32: loss, gradients, optimisers; under bfloat16 the
           device may be three times as far from float32 as the CPU's own bfloat16 is; views, masks, data, measurements
exchange   a run trained on the device is evaluated on the CPU, and the reverse
arms       every arm of the plan at demo scale: a few steps, evaluation, figures
scales     every arm of the plan at gpu scale: 20 steps at true widths and batch; two steps of paper-scale networks
sync       nothing in a step waits for the device; synchronising calls and pageable copies by the profiler
resume     a run that is killed after an epoch ends with the weights of one that is not
ranks      two gloo ranks on the one device against one process
make       one study through make
packing    runs side by side on the one device beside one at a time
speed      examples a second at gpu scale beside the step's own matrix products, a large product and plain references
switches   channels-last, cuDNN's benchmark mode, --compile: equal results, and what each gains
"""

import contextlib
import dataclasses
import io
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_speed
import numpy as np
import torch
import torchvision
from gpu_tools import PAPERS, Case, Check, Failed, NotApplicable
from plan import ROOT

from common import cli, devices, files
from common.cli import fail

PARTS: dict[str, Callable[[Check], Iterator[Case]]] = {
    "agreement": gpu_parts.agreement, "exchange": gpu_parts.exchange, "arms": gpu_parts.arms,
    "scales": gpu_parts.scales, "sync": gpu_parts.sync, "resume": gpu_parts.resume, "ranks": gpu_parts.ranks,
    "make": gpu_parts.make, "packing": gpu_parts.packing, "speed": gpu_speed.speed, "switches": gpu_speed.switches,
}  # fmt: skip
TIMED = ("packing", "speed", "switches")  # they must have the machine for themselves
HANGS = 900  # seconds after which a process is given up
DRY = "dry run: nothing about a GPU was shown"


@dataclasses.dataclass
class Row:
    part: str
    case: str
    outcome: str  # passed, failed, not applicable, not run
    seconds: float
    found: str


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers hold for."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
             "numpy": np.__version__, "processor": f"{platform.machine()}, {os.cpu_count()} cores"}  # fmt: skip
    if device.type == "cpu":
        return {"device": "cpu", **facts}
    seen = torch.cuda.get_device_properties(device)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (subprocess.run(asked, capture_output=True, text=True).stdout.splitlines() or [driver])[0]
    memory = f"{seen.total_memory / 2**30:.0f} GiB"
    cuda = {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()), "driver": driver}
    return {"device": seen.name, "memory": memory, **cuda, **facts}


def write_report(folder: Path, facts: dict[str, str], rows: list[Row], numbers: dict[str, Any]) -> None:
    """report.md and report.json, each written atomically."""
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row.part] = seconds.get(row.part, 0.0) + row.seconds
    counts = Counter(row.outcome for row in rows)
    lines = ["# GPU check", "", *([f"**{DRY}**", ""] if facts["device"] == "cpu" else [])]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- seconds: {', '.join(f'{part} {spent:.0f}' for part, spent in seconds.items())}", ""]
    lines += [summary(counts), "", "| part | case | outcome | seconds | found |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (row.part, row.case, row.outcome, f"{row.seconds:.1f}", row.found)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    files.write_text(folder / "report.md", "\n".join(lines) + "\n")
    every = {"machine": facts, "seconds": seconds, "counts": counts, "numbers": finite(numbers)}
    files.write_json(folder / "report.json", every | {"rows": [dataclasses.asdict(row) for row in rows]})


def finite(value: Any) -> Any:
    """`value` with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else None


def summary(counts: Counter) -> str:
    return ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "not applicable", "not run"))


def sentence(error: BaseException, printed: str) -> str:
    """An error as one line: the sentence that a script printed before it stopped, or the exception's."""
    if isinstance(error, SystemExit):
        told = [line for line in printed.splitlines() if line.startswith("error:")]
        return told[-1] if told else f"exit code {error.code}"
    text = str(error).strip().splitlines()
    words = text[0] if text else ""
    return words if isinstance(error, Failed | NotApplicable) else f"{type(error).__name__}: {words}"


def attempt(part: str, name: str, case: Callable[[], str], log: Path) -> Row:
    """Run one case; what it prints, and the traceback of its failure, go to the log."""
    printed, started = io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            outcome, found = "passed", case()
    except NotApplicable as error:
        outcome, found = "not applicable", str(error)
    except (Exception, SystemExit) as error:
        outcome, found = "failed", sentence(error, printed.getvalue())
        printed.write(traceback.format_exc())
    seconds = time.perf_counter() - started
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"=== {part}: {name}\n{printed.getvalue()}\n")
    return Row(part, name, outcome, seconds, found)


Job = tuple[str, list[str]]  # a part, and the papers to take it with


def jobs_of(parts: list[str], papers: list[str]) -> list[Job]:
    """What can run side by side: the long parts paper by paper."""
    split = ("exchange", "arms", "scales")
    return [job for part in parts for job in ([(part, [one]) for one in papers] if part in split else [(part, papers)])]


def elsewhere(job: Job, check: Check, folder: Path, left: Callable[[], float]) -> tuple[list[Row], dict[str, Any], str]:
    """(rows, numbers, log) of a job from a gpu_check of its own."""
    part, papers = job
    words = ["--device", str(check.device), "--data", str(check.data), "--report", str(folder), "--jobs", "1"]
    words += ["--parts", part, "--papers", *papers]
    words += ["--minutes", f"{max(0.0, left())}"] if math.isfinite(left()) else []
    try:
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=HANGS)
    except subprocess.TimeoutExpired:
        return [Row(part, ", ".join(papers), "failed", HANGS, f"no end after {HANGS} seconds")], {}, ""
    try:
        report = files.read_json(folder / "report.json")
        return [Row(**row) for row in report["rows"]], report["numbers"], (folder / "log.txt").read_text()
    except (OSError, files.DamagedFile, KeyError) as error:
        last = (done.stderr.strip().splitlines() or [str(error)])[-1]
        return [Row(part, ", ".join(papers), "failed", 0.0, f"ended with {done.returncode}: {last}")], {}, done.stderr


def parse_args(argv: list[str] | None = None) -> Any:
    parser = cli.Parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:1; cpu: a dry run")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--papers", nargs="+", choices=tuple(PAPERS), default=list(PAPERS))
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where data sets lie, if there are any")
    parser.add_argument("--report", type=Path, default=ROOT / "runs/gpu-check", help="folder of the report")
    parser.add_argument("--jobs", type=cli.int_min(1), help="processes side by side; default: 1 on a CPU, on a GPU "
                        "one for two cores and 12 GiB of memory")  # fmt: skip
    parser.add_argument("--minutes", type=cli.float_in(0), default=math.inf, help="cases that would begin later are "
                        "not run")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 if a case failed or was not run."""
    args = parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        fail("no CUDA GPU was found (make doctor says more): make gpu-check DEVICE=cpu is a dry run without one")
    device = devices.select_device(args.device, "gpu")
    began, rows = time.perf_counter(), []
    args.report.mkdir(parents=True, exist_ok=True)
    log = args.report / "log.txt"
    log.unlink(missing_ok=True)
    facts = machine(device)
    ending = f"; {DRY}" if device.type == "cpu" else ""
    print(f"GPU check on {facts['device']}: {', '.join(args.parts)}{ending}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        check = Check(device, args.papers, args.data.resolve(), Path(work))

        def left() -> float:
            return args.minutes - (time.perf_counter() - began) / 60

        def add(new: list[Row]) -> None:
            rows.extend(new)
            rows.sort(key=lambda row: list(PARTS).index(row.part))
            for row in new:
                print(f"{row.outcome:>14}  {row.seconds:6.1f} s  {row.part}: {row.case}: {row.found}", flush=True)
            write_report(args.report, facts, rows, check.numbers)

        alone = list(args.parts)
        if (jobs := args.jobs or default_jobs(device)) > 1:
            alone = [part for part in args.parts if part in TIMED]
            together = jobs_of([part for part in args.parts if part not in TIMED], args.papers)
            with ThreadPoolExecutor(jobs) as pool:
                running = [
                    pool.submit(elsewhere, job, check, check.work / f"job-{number}", left)
                    for number, job in enumerate(together)
                ]
                for one in as_completed(running):
                    found, numbers, text = one.result()
                    check.numbers |= numbers
                    with open(log, "a", encoding="utf-8") as file:
                        file.write(text)
                    add(found)
        for part in alone:
            for name, case in listed(check, part):
                if left() <= 0:
                    add([Row(part, name, "not run", 0.0, f"{args.minutes:g} minutes were over")])
                else:
                    add([attempt(part, name, case, log)])
    counts = Counter(row.outcome for row in rows)
    print(f"{summary(counts)} in {time.perf_counter() - began:.0f} s{ending}; the report: {args.report / 'report.md'}")
    return int(counts["failed"] + counts["not run"] > 0)


def default_jobs(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory // (12 * 2**30)
    return max(1, min((os.cpu_count() or 1) // 2, memory))


def listed(check: Check, part: str) -> Iterator[Case]:
    """The cases of a part; where they cannot be listed, a case that fails with the reason."""
    try:
        yield from list(PARTS[part](check))
    except Exception as error:
        reason = error

        def unlisted() -> str:
            raise reason

        yield "the list of cases", unlisted


if __name__ == "__main__":
    sys.exit(main())

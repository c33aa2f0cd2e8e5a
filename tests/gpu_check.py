"""Check a GPU (`make gpu-check`): does everything run, do the results agree with the CPU's, how fast is it?

    make gpu-check PYTHON=python3                        # 70 of its cases took 6 minutes on an H200
    make gpu-check DEVICE=cpu                            # dry run at tiny sizes; shows nothing about a GPU
    make gpu-check PARTS="agreement sync" PAPERS=bsa     # some parts, some papers

Needs no network, no data and no git history. If CIFAR or the MeSH concepts are not in --data, random numbers of the
same shape replace them. Writes report.md, report.json and log.txt (output of the scripts, tracebacks) to --report and
updates them after each case. A failed case does not stop the others. Exit code 1 unless all applicable cases passed.
On a GPU, the parts without timing run concurrently in --jobs processes. By default the parts run in this order, the
longest last: with --minutes, those may not be run.

agreement  with the same weights and batch, CPU and device agree in float32: loss, gradients, optimisers, views, masks,
           data, metrics. In bfloat16 the device's difference from float32 may be three times the CPU's
sync       no host-device synchronisation in a step; the profiler counts synchronising calls and pageable copies
resume     a run that is killed after an epoch and resumed gives the weights of an uninterrupted run
ranks      training with two gloo ranks on one device agrees with training in one process
make       one study through make
exchange   a run trained on the device is evaluated on the CPU, and vice versa
speed      examples per second at gpu scale; time share of matrix products; a large product; plain references
packing    throughput of concurrent runs on one device against one run at a time
switches   channels-last, cuDNN's benchmark mode, --compile: same results, and the gain of each
scales     each arm of the design at gpu scale: 20 steps at full width and batch size; two steps of paper-scale networks
arms       each arm of the design at demo scale: a few steps, evaluation, figures
"""

import contextlib
import dataclasses
import io
import itertools
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
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_speed
import numpy as np
import torch
import torchvision
from gpu_tools import PAPERS, Case, CaseFailed, Check, NotApplicable
from plan import ROOT

from common import cli, devices, files
from common.cli import fail

PARTS: dict[str, Callable[[Check], Iterator[Case]]] = {
    "agreement": gpu_parts.agreement, "sync": gpu_parts.sync, "resume": gpu_parts.resume, "ranks": gpu_parts.ranks,
    "make": gpu_parts.make, "exchange": gpu_parts.exchange, "speed": gpu_speed.speed, "packing": gpu_parts.packing,
    "switches": gpu_speed.switches, "scales": gpu_parts.scales, "arms": gpu_parts.arms,
}  # fmt: skip
TIMED = ("packing", "speed", "switches")  # parts that measure time: no other process may run
JOB_TIMEOUT = 900  # seconds
DRY_RUN_NOTE = "dry run on the CPU: this shows nothing about a GPU"


@dataclasses.dataclass
class Row:
    """One case in the report."""

    part: str
    case: str
    outcome: str  # passed, failed, not applicable, not run
    seconds: float
    found: str


def machine_info(device: torch.device) -> dict[str, str]:
    """Return device, driver and library versions."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if device.type == "cpu":
        return {"device": "cpu", **versions}
    gpu = torch.cuda.get_device_properties(device)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (subprocess.run(command, capture_output=True, text=True).stdout.splitlines() or [driver])[0]
    return {
        "device": gpu.name,
        "memory": f"{gpu.total_memory / 2**30:.0f} GiB",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "driver": driver,
        **versions,
    }


def write_report(folder: Path, machine: dict[str, str], rows: list[Row], numbers: dict[str, Any]) -> None:
    """Write report.md and report.json, each atomically."""
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row.part] = seconds.get(row.part, 0.0) + row.seconds
    counts = Counter(row.outcome for row in rows)
    lines = ["# GPU check", "", *([f"**{DRY_RUN_NOTE}**", ""] if machine["device"] == "cpu" else [])]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [f"- seconds: {', '.join(f'{part} {total:.0f}' for part, total in seconds.items())}", ""]
    lines += [summary(counts), "", "| part | case | outcome | seconds | finding |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (row.part, row.case, row.outcome, f"{row.seconds:.1f}", row.found)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    files.write_text(folder / "report.md", "\n".join(lines) + "\n")
    report = {
        "machine": machine,
        "seconds": seconds,
        "counts": counts,
        "numbers": without_nan(numbers),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    files.write_json(folder / "report.json", report)


def without_nan(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinity, which are not valid JSON."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else None


def summary(counts: Counter) -> str:
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "not applicable", "not run"))


def error_line(error: BaseException, printed: str) -> str:
    """Return an error as one line: the message that a script printed before it exited, or that of the exception."""
    if isinstance(error, SystemExit):
        messages = [line for line in printed.splitlines() if line.startswith("error:")]
        return messages[-1] if messages else f"exit code {error.code}"
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    return message if isinstance(error, CaseFailed | NotApplicable) else f"{type(error).__name__}: {message}"


def run_case(part: str, name: str, case: Callable[[], str], log: Path) -> Row:
    """Run one case. Its output and the traceback of a failure go to the log."""
    printed, start = io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            outcome, finding = "passed", case()
    except NotApplicable as error:
        outcome, finding = "not applicable", str(error)
    except (Exception, SystemExit) as error:
        outcome, finding = "failed", error_line(error, printed.getvalue())
        printed.write(traceback.format_exc())
    seconds = time.perf_counter() - start
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"=== {part}: {name}\n{printed.getvalue()}\n")
    return Row(part, name, outcome, seconds, finding)


Job = tuple[str, list[str]]  # a part and its papers


def split_into_jobs(parts: list[str], papers: list[str]) -> list[Job]:
    """Return jobs that can run concurrently: one per part, and for the long parts one per paper."""
    jobs: list[Job] = []
    for part in parts:
        if part in ("exchange", "arms", "scales"):
            jobs += [(part, [paper]) for paper in papers]
        else:
            jobs.append((part, papers))
    return jobs


def run_job(
    job: Job, check: Check, folder: Path, minutes_left: Callable[[], float]
) -> tuple[list[Row], dict[str, Any], str]:
    """Run a job in a separate gpu_check process. Returns (rows, numbers, log)."""
    part, papers = job
    flags = ["--device", str(check.device), "--data", str(check.data), "--report", str(folder), "--jobs", "1"]
    flags += ["--parts", part, "--papers", *papers]
    if math.isfinite(minutes_left()):
        flags += ["--minutes", f"{max(0.0, minutes_left())}"]
    try:
        done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, timeout=JOB_TIMEOUT)
    except subprocess.TimeoutExpired:
        failure = Row(part, ", ".join(papers), "failed", JOB_TIMEOUT, f"timeout after {JOB_TIMEOUT} seconds")
        return [*finished_rows(folder), failure], {}, ""
    rows = finished_rows(folder)
    if done.returncode == int(any(row.outcome in ("failed", "not run") for row in rows)):
        if not rows:  # the part has no case for these papers
            return [], {}, ""
        return rows, files.read_json(folder / "report.json")["numbers"], (folder / "log.txt").read_text()
    last_line = (done.stderr.strip().splitlines() or [""])[-1]
    failure = Row(part, ", ".join(papers), "failed", 0.0, f"exit code {done.returncode}: {last_line}")
    return [*rows, failure], {}, done.stderr


def finished_rows(folder: Path) -> list[Row]:
    """Return the cases that the job with this report folder has finished so far."""
    try:
        return [Row(**row) for row in files.read_json(folder / "report.json")["rows"]]
    except FileNotFoundError:
        return []


def parse_args(argv: list[str] | None = None) -> Any:
    parser = cli.Parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:N; cpu: dry run")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--papers", nargs="+", choices=tuple(PAPERS), default=list(PAPERS), help="papers to check")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of data sets, if any")
    parser.add_argument("--report", type=Path, default=ROOT / "runs/gpu-check", help="folder of the report")
    jobs_help = "concurrent processes; default: 1 on a CPU, on a GPU one per two cores and 12 GiB of memory"
    parser.add_argument("--jobs", type=cli.int_in(1), help=jobs_help)
    minutes_help = "time limit: cases that would start later are not run"
    parser.add_argument("--minutes", type=cli.float_in(0), default=math.inf, help=minutes_help)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the check. Returns the exit code: 1 if a case failed or was not run, else 0."""
    args = parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        fail("no CUDA GPU found: run make doctor for the reason, or make gpu-check DEVICE=cpu for a dry run")
    device = devices.select_device(args.device, "gpu")
    start, rows = time.perf_counter(), []
    args.report.mkdir(parents=True, exist_ok=True)
    log = args.report / "log.txt"
    log.unlink(missing_ok=True)
    machine = machine_info(device)
    note = f"; {DRY_RUN_NOTE}" if device.type == "cpu" else ""
    print(f"GPU check on {machine['device']}: {', '.join(args.parts)}{note}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        check = Check(device, args.papers, args.data.resolve(), Path(work))

        def minutes_left() -> float:
            return args.minutes - (time.perf_counter() - start) / 60

        def in_order(rows: list[Row]) -> list[Row]:
            return sorted(rows, key=lambda row: args.parts.index(row.part))

        def add(new: list[Row]) -> None:
            rows[:] = in_order(rows + new)
            for row in new:
                print(f"{row.outcome:>14}  {row.seconds:6.1f} s  {row.part}: {row.case}: {row.found}", flush=True)
            write_report(args.report, machine, rows, check.numbers)

        def run_concurrently(concurrent: list[Job]) -> None:
            with ThreadPoolExecutor(jobs) as pool:
                running, shown = {}, []  # report folders of the jobs that have not ended; their cases in the report
                for job in concurrent:
                    folder = check.work / f"job-{job[0]}-{job[1][0]}"
                    running[pool.submit(run_job, job, check, folder, minutes_left)] = folder
                while running:
                    for future in wait(running, timeout=2, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        new_rows, numbers, text = future.result()
                        check.numbers |= numbers
                        with open(log, "a", encoding="utf-8") as file:
                            file.write(text)
                        add(new_rows)
                    unfinished = [row for folder in running.values() for row in finished_rows(folder)]
                    if unfinished != shown:
                        write_report(args.report, machine, in_order(rows + unfinished), check.numbers)
                        shown = unfinished

        jobs = args.jobs or default_jobs(device)
        for timed, group in itertools.groupby(args.parts, key=lambda part: part in TIMED):
            if jobs > 1 and not timed:
                run_concurrently(split_into_jobs(list(group), args.papers))
                continue
            for part in group:
                for name, case in list_cases(check, part):
                    if minutes_left() <= 0:
                        limit = f"the time limit of {args.minutes:g} minutes was reached"
                        add([Row(part, name, "not run", 0.0, limit)])
                    else:
                        add([run_case(part, name, case, log)])
    counts = Counter(row.outcome for row in rows)
    print(f"{summary(counts)} in {time.perf_counter() - start:.0f} s{note}; report: {args.report / 'report.md'}")
    return int(counts["failed"] + counts["not run"] > 0)


def default_jobs(device: torch.device) -> int:
    """Return 1 on a CPU, on a GPU one job per two cores and 12 GiB of GPU memory."""
    if device.type == "cpu":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory // (12 * 2**30)
    return max(1, min((os.cpu_count() or 1) // 2, memory))


def list_cases(check: Check, part: str) -> Iterator[Case]:
    """Yield the cases of a part. If listing them fails, yield one case that fails with that error."""
    try:
        yield from list(PARTS[part](check))
    except Exception as error:
        listing_error = error  # `error` is undefined after the except clause

        def fail_listing() -> str:
            raise listing_error

        yield "list of cases", fail_listing


if __name__ == "__main__":
    sys.exit(main())

"""A run folder: arguments, log, checkpoints, and exact resume after an interruption.

with run_lock(out):                              # file lock; signals and disk errors become exit codes
    run = Run(arguments, __file__)               # fails if `out` contains a run with other flags
    run.write_config("glyphs10, resnet8", environment)   # args.json; prints the first line
    start_epoch = run.resume(model, optimizer)   # number of finished epochs, None in a new run
    for epoch in range(start_epoch or 0, final_epoch):
        ...
        if run.finish_if_diverged(epoch + 1, losses):    # NaN or infinity in weights or losses
            return
        run.end_epoch(epoch + 1, final_epoch, metrics)   # a line of train.jsonl, then state.pt
    run.save_model({"model": ...})               # model.pt; deletes the states
"""

import ast
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common import checkpoints, devices, files
from common.cli import NON_METHOD_FLAGS, RUNS_ON_THIS_GPU, fail

FORMAT = 2  # of run folders: args.json, train.jsonl, state.pt, model.pt. args.json of format 1 has no number
FILE_FLAGS = ("data", "data_file", "init_from")  # flags that may name a file whose content defines the run


class Run:
    """A run folder, which the caller has locked (`run_lock`). Only rank 0 writes.

    `arguments` are the parsed flags (see `cli.run_flags`), `source` is the script whose hash is recorded. Exits with
    code 2 if the folder --out contains a run with other flags. With --replace that folder is renamed instead; it is
    never deleted. With --tensorboard the metrics are also written to OUT/tensorboard.
    """

    def __init__(self, arguments: Mapping[str, Any], source: str, rank: int = 0):
        self.folder, self.rank, self.source = Path(arguments["out"]), rank, Path(source)
        self.writer_class = summary_writer() if arguments["tensorboard"] and rank == 0 else None
        self.name = "/".join(self.folder.parts[-2:])
        self.arguments = json.loads(json.dumps(dict(arguments), default=str))
        self.digests = digests_of_files(self.arguments)
        self.method_arguments = method_arguments(self.arguments, self.digests)
        self.log: list[str] = []  # the lines of train.jsonl
        if rank == 0:
            self._check_existing()
        devices.barrier()
        self.finished = (self.folder / "model.pt").exists()
        if self.finished and rank == 0:
            self._delete_states()
            print(f"{self.folder} is finished: nothing to do", flush=True)

    def _check_existing(self) -> None:
        for name in ("args.json", "train.jsonl", "state.pt", "state.previous.pt", "model.pt", "metrics.json"):
            if (self.folder / name).is_dir():
                message = f"{self.folder / name} is a folder, but a run writes a file of this name: use another --out"
                fail(message, record=False)
        differences = self._differences()
        if not differences:
            return
        if not self.arguments["replace"]:
            fail(
                f"{self.folder} contains a run with other flags ({', '.join(differences)}): use another --out, or "
                "--replace to rename that folder",
                record=False,
            )
        number = 1
        while (new_name := self.folder.with_name(f"{self.folder.name}.replaced-{number}")).exists():
            number += 1
        self.folder.rename(new_name)
        self.folder.mkdir()
        print(f"moved the old run (other flags: {', '.join(differences)}) to {new_name}", flush=True)

    def _differences(self) -> list[str]:
        """Return `--flag old -> new` for each flag with another value in the run of this folder."""
        if not (self.folder / "args.json").exists():
            return []
        arguments, provenance = read_arguments(self.folder)
        old = method_arguments(arguments, provenance.get("files", {}))
        return [
            f"--{name.replace('_', '-')} {old.get(name)} -> {self.method_arguments.get(name)}"
            for name in sorted({*old, *self.method_arguments})
            if old.get(name) != self.method_arguments.get(name)
        ]

    def write_config(self, summary: str, environment: Mapping[str, Any]) -> None:
        """Write args.json. In a resumed run, check that `environment` equals that of args.json.

        `environment` contains the entries of `devices.environment`, digests of data and weights, and the number of
        steps. The precision that --precision selects on this device is added. With --resume-elsewhere precision and the
        entries of `devices.environment` may differ; the change is added to args.json.
        Prints the first line of the run: its name, `summary` (data set and network) and device.
        """
        if self.rank:
            return
        print(f"{self.name}: {summary}, {environment['device']}", flush=True)
        device = torch.device("cpu" if environment["device"] == "cpu" else "cuda")
        bfloat16 = devices.uses_bfloat16(self.arguments["precision"], device)
        environment = {**environment, "precision": "bfloat16" if bfloat16 else "float32"}
        path, provenance = self.folder / "args.json", script_provenance(self.source)
        if not path.exists():
            recorded = {**environment, "files": self.digests, **provenance, "format": FORMAT}
            files.write_json(path, {"arguments": self.arguments, "provenance": recorded})
            return
        arguments, old = read_arguments(self.folder)
        # Earlier versions did not record the precision.
        current = {"precision": environment["precision"], **old, **(old["resumed"][-1] if old.get("resumed") else {})}
        changes = {}
        for name, value in {**environment, "script": provenance["script"]}.items():
            if current.get(name) == value:
                continue
            if name not in devices.ENVIRONMENT:
                before, now = (str(item)[:16] for item in (current.get(name), value))  # some are sha256 digests
                fail(f"cannot resume {self.folder}: {name} was {before}, now {now}: use the former {name}, or another "
                     "--out", record=False)  # fmt: skip
            changes[name] = value
        if changes and not self.arguments["resume_elsewhere"]:
            described = ", ".join(f"{name} {current.get(name)} -> {value}" for name, value in changes.items())
            fail(f"{self.folder} was started in another environment ({described}): resume it there, use another --out, "
                 "or add --resume-elsewhere (make: RESUME=elsewhere)", record=False)  # fmt: skip
        if changes:
            old["resumed"] = [*old.get("resumed", []), {name: environment[name] for name in devices.ENVIRONMENT}]
            files.write_json(path, {"arguments": arguments, "provenance": old})
        if old.get("source") != provenance["source"]:
            changed = f"{self.source.name} or an imported module has changed since {self.folder} was started"
            print(f"warning: {changed}", file=sys.stderr)

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """Return the last saved state, or None in a new run. Removes later epochs from the log.

        Exits with code 2 if the run has finished epochs but no usable state: it never restarts silently.
        """
        state, damaged = self._newest_state(device)
        if state is None and (damaged or self._has_epochs()):
            fail(f"{self.folder} has no usable state: move {self.folder} away and train this run again")
        self.log = state["log"] if state else []
        if self.writer_class:  # purge_step: the epochs of an interrupted attempt are written again
            self.writer = self.writer_class(str(self.folder / "tensorboard"), purge_step=0)
            for line in self.log:
                self._write_events(json.loads(line))
        if self.rank == 0:
            self._write_log()
            if state:
                print(f"{self.name}: resuming after epoch {state['epoch']}", flush=True)
        return state

    def _newest_state(self, device: torch.device) -> tuple[dict[str, Any] | None, bool]:
        """Return (newest intact state of this run or None, whether a damaged state was found)."""
        damaged = False
        for path in (self.folder / "state.pt", self.folder / "state.previous.pt"):
            try:
                state = checkpoints.load(path, device)
                if not isinstance(state, dict) or state.get("arguments") != self.method_arguments:
                    raise files.DamagedFile(f"{path} belongs to another run")
                if state.get("format") != FORMAT:
                    raise files.DamagedFile(f"{path} was written by another version of this code")
                return state, damaged
            except FileNotFoundError:
                continue
            except files.DamagedFile as error:
                damaged = True
                if self.rank == 0:
                    print(f"warning: {error}", file=sys.stderr)
        return None, damaged

    def _write_log(self) -> None:
        files.write_text(self.folder / "train.jsonl", "".join(line + "\n" for line in self.log))

    def _has_epochs(self) -> bool:
        """Return whether train.jsonl has a line of an epoch other than 0, or a damaged line."""
        try:
            return any(line.get("epoch") != 0 for line in files.read_lines(self.folder / "train.jsonl"))
        except files.DamagedFile:
            return True

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
        """Load the last saved state into `model` and `optimizer`, which `end_epoch` will save.

        Returns the number of finished epochs, None in a new run. Sets `self.extra` to the other saved entries.
        """
        self.model, self.optimizer = model, optimizer
        saved = self.load_state(next(model.parameters()).device)
        if saved is None:
            return None
        checkpoints.load_weights(model, saved["model"], self.folder)
        optimizer.load_state_dict(saved["optimizer"])
        standard = ("format", "epoch", "arguments", "log", "model", "optimizer")
        self.extra = {name: value for name, value in saved.items() if name not in standard}
        return saved["epoch"]

    def finish_if_diverged(self, epoch: int, *tensors: torch.Tensor) -> bool:
        """Finish the run if a weight, a buffer or one of `tensors` is NaN or infinite. Returns whether it did.

        Called once per epoch: a check per step would force a host-device synchronisation.
        """
        state = [value for value in self.model.state_dict().values() if isinstance(value, torch.Tensor)]
        if devices.finite_on_all_ranks([*state, *tensors]):
            return False
        self._finish_diverged(epoch, state[0].device)
        return True

    def end_epoch(
        self,
        epoch: int,
        final_epoch: int,
        metrics: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        """Log `metrics` and save model, optimizer and `extra`. Epoch 0 is the state before training.

        `details` are written to train.jsonl like the metrics, but not printed.
        """
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **extra}
        self.save(epoch, {**metrics, **(details or {})}, state)
        if epoch:
            self.print_epoch(epoch, final_epoch, metrics)

    def save(self, epoch: int, metrics: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Append `metrics` to train.jsonl, then replace state.pt. The old state becomes state.previous.pt.

        The state contains all lines of the log, so a damaged train.jsonl is restored when the run resumes.
        """
        if self.rank:
            return
        self.log.append(json.dumps({"epoch": epoch, **metrics}))
        files.append_line(self.folder / "train.jsonl", self.log[-1])
        path = self.folder / "state.pt"
        if path.exists():
            os.replace(path, self.folder / "state.previous.pt")
        header = {"format": FORMAT, "epoch": epoch, "arguments": self.method_arguments, "log": self.log}
        checkpoints.save(path, {**header, **state})
        if self.writer_class:
            self._write_events({"epoch": epoch, **metrics})

    def _write_events(self, line: Mapping[str, Any]) -> None:
        """Write the numbers in a line of train.jsonl for TensorBoard."""
        for name, value in line.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, line["epoch"])
        self.writer.flush()

    def save_model(self, weights: Mapping[str, Any]) -> None:
        """Write model.pt, which marks the run as finished, and delete the states."""
        if self.rank:
            return
        checkpoints.save(self.folder / "model.pt", {"format": FORMAT, "arguments": self.method_arguments, **weights})
        self._delete_states()

    def _finish_diverged(self, epoch: int, device: torch.device) -> None:
        """Finish a run whose loss or weights became NaN or infinite in `epoch`.

        model.pt gets the weights of the last saved epoch, which are finite.
        """
        if self.rank:
            return
        last, _ = self._newest_state(device)
        if last is None:
            fail(f"{self.folder}: training diverged in epoch {epoch} without a usable earlier checkpoint: use a "
                 "lower --lr and another --out")  # fmt: skip
        self.log = last["log"]
        self._write_log()
        print(f"{self.name}: diverged in epoch {epoch}; kept the weights of epoch {last['epoch']}", flush=True)
        self.save_model({"model": last["model"], "epoch": last["epoch"], "diverged": True})

    def print_epoch(self, epoch: int, final_epoch: int, metrics: Mapping[str, Any]) -> None:
        """Print one line with the metrics of an epoch."""
        if self.rank == 0:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"{self.name}  epoch {epoch}/{final_epoch}  {numbers}")

    def _delete_states(self) -> None:
        for name in ("state.pt", "state.previous.pt"):
            (self.folder / name).unlink(missing_ok=True)


def summary_writer() -> Any:
    """Return torch's SummaryWriter class. Exits with code 2 if the package tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional
    except ImportError:
        install = f"{sys.executable} -m pip install tensorboard"
        fail(f"--tensorboard needs the package tensorboard: run `{install}`, or drop the flag", record=False)
    return SummaryWriter


def digests_of_files(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return flag -> sha256 of the file that it names, for FILE_FLAGS. Exits with code 2 if a file cannot be read."""
    digests = {}
    for name in FILE_FLAGS:
        path = arguments.get(name)
        if path is None or (name == "data" and not Path(path).is_file()):  # --data may be a folder
            continue
        try:
            with open(path, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            fail(f"--{name.replace('_', '-')} {path} does not exist: give an existing file")
        except OSError as error:
            fail(f"--{name.replace('_', '-')} {path} cannot be read ({error.strerror}): give a readable file")
    return digests


def method_arguments(arguments: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments that define a run: all but paths and hardware. Files are replaced by their sha256."""
    return {
        name: digests.get(name, value)
        for name, value in arguments.items()
        if name in digests or name not in NON_METHOD_FLAGS
    }


def read_arguments(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (arguments, provenance) from args.json of a run.

    Raises FileNotFoundError. Exits with code 2 if the file is damaged or cannot be read.
    """
    path = Path(folder) / "args.json"
    try:
        config = files.read_json(path)
        return dict(config["arguments"]), dict(config["provenance"])
    except files.DamagedFile as error:
        fail(f"{error}: move {folder} away and train this run again")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}): check its permissions, or use another folder")
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{path} is damaged ({files.error_reason(error)}): move {folder} away and train this run again")


def read_log(folder: Path, epoch: int) -> list[dict[str, Any]]:
    """Return the lines of train.jsonl, epochs 0 to `epoch`. Exits with code 2 if a line is missing or damaged."""
    path = Path(folder) / "train.jsonl"
    try:
        lines = files.read_lines(path)
    except files.DamagedFile as error:
        fail(f"{error}: move {folder} away and train this run again")
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}): move {folder} away and train this run again")
    if [line.get("epoch") for line in lines] != list(range(epoch + 1)):
        fail(f"{path} is damaged (epochs are missing): move {folder} away and train this run again")
    return lines


def load_finished(folder: Path, eval_script: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return (arguments, provenance, content of model.pt) of a finished run of the train.py beside `eval_script`.

    The provenance contains only numbers and strings. `resumed` counts how often the run was resumed elsewhere,
    `eval_source` is the `source_digest` of `eval_script`.
    Exits with code 2 if the run is missing, unfinished, damaged, of another script or without a data seed, or if
    model.pt does not belong to args.json.
    """
    folder, script = Path(folder), f"{Path(eval_script).absolute().parent.name}/train.py"
    try:
        arguments, provenance = read_arguments(folder)
        model = checkpoints.load(folder / "model.pt")
    except FileNotFoundError:
        fail(f"{folder} contains no finished run (args.json, model.pt): train it first with {script} --out {folder}")
    except files.DamagedFile as error:
        fail(f"{error}: move {folder} away and train this run again")
    if provenance.get("script") != script:
        fail(f"{folder} contains a run of {provenance.get('script')}, not of {script}: give another folder")
    if provenance.get("format") != FORMAT:
        found = f"format {provenance.get('format') or 1}, not {FORMAT}"
        fail(f"{folder} was not trained by this version ({found}): move {folder} away and train this run again")
    expected = method_arguments(arguments, provenance.get("files", {}))
    if not isinstance(model, dict) or model.get("arguments") != expected:
        fail(f"{folder / 'model.pt'} does not belong to args.json: move {folder} away and train this run again")
    provenance.pop("files", None)
    if "resumed" in provenance:
        provenance["resumed"] = len(provenance["resumed"])
    provenance["eval_source"] = source_digest(Path(eval_script))
    return arguments, provenance, model


def check_data(digest: str, expected: str | None, data: Path, folder: Path) -> None:
    """Exit with code 2 if `digest`, that of the data in `data`, is not that of the training of the run in `folder`."""
    if expected and digest != expected:
        digests = f"digest {digest[:12]}, not {expected[:12]}"
        fail(f"--data {data} differs from the training data of {folder} ({digests}): give the data used in training")


def write_metrics(path: Path, metrics: Mapping[str, Any], printed: Iterable[str]) -> None:
    """Write the metrics of an evaluation as JSON, and print those of `printed` that are numbers."""
    files.write_json(path, metrics)
    numbers = (f"{name} {metrics[name]:.4g}" for name in printed if isinstance(metrics.get(name), float))
    print(f"{path.parent}: {'  '.join(numbers)}")


def imported_files(source: Path) -> list[Path]:
    """Return `source` and all modules of this project that it imports, directly or indirectly, sorted."""
    source = source.absolute()
    root, seen, pending = source.parent.parent, {source}, [source]
    while pending:
        for node in ast.walk(ast.parse(pending.pop().read_bytes())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                file = root.joinpath(*module.split(".")).with_suffix(".py")
                if not file.is_file():
                    continue
                loaded = Path(getattr(sys.modules.get(module), "__file__", None) or file)
                if loaded not in seen:
                    seen.add(loaded)
                    pending.append(loaded)
    return sorted(seen)


@functools.cache  # a process imports each file once
def source_digest(source: Path) -> str:
    """Return the sha256 of a script and of all modules of this project that it imports."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in imported_files(source))).hexdigest()


def script_provenance(source: Path) -> dict[str, Any]:
    """Return the script's name, sha256 of it and its imports, git commit, dirty flag and number of runs on this GPU.

    `commit` and `dirty` are None outside a git clone. `dirty` ignores results/ and the READMEs, which `make publish`
    writes between runs.
    """

    def git(*arguments: str) -> str | None:
        if not shutil.which("git"):
            return None
        process = subprocess.run(["git", "-C", str(source.parent), *arguments], capture_output=True, text=True)
        return process.stdout.strip() if process.returncode == 0 else None

    ignored = (":(top,exclude)results", ":(top,exclude,glob)**/README.md")
    status = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *ignored)
    return {
        "script": f"{source.absolute().parent.name}/{source.name}",
        "source": source_digest(source),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "runs_on_this_gpu": int(os.environ.get(RUNS_ON_THIS_GPU, "1")),
    }

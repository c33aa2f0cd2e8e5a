"""One run's folder: its lock, arguments, log and state, and the exact way back in after a kill.

with run_lock(out):                                  # locked; signals and a full disk become exit codes
    run = Run(out, arguments, __file__)          # a run with other arguments is refused
    run.write_config("glyphs10, resnet8", provenance)   # args.json, and the first line on the screen
    first = run.resume(model, optimizer)         # the epoch to go on after, None at the start of a run
    for epoch in range(first or 0, last):
        ...
        if run.diverged(epoch + 1, losses):      # weights or losses are not finite: the run is finished here
            return
        run.end_epoch(epoch + 1, last, record)   # a line in train.jsonl, then state.pt; one line on the screen
    run.save_model({"model": ...})                   # model.pt; the states go
"""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common import checkpoints, devices, files
from common.cli import NON_METHOD_FLAGS, SHARED, fail


class Run:
    """A run folder that is held by this process. Of several ranks only rank 0 writes.

    `arguments` are the parsed flags, `source` the script whose hash is recorded. Stops (exit 2) where the
    folder holds a run with other arguments (with `replace` that one is moved aside, never deleted).
    """

    def __init__(self, out: Path, arguments: Mapping[str, Any], source: str, replace: bool = False, rank: int = 0):
        self.folder, self.rank, self.source = Path(out), rank, Path(source)
        self.name = "/".join(self.folder.parts[-2:])
        self.arguments = json.loads(json.dumps(dict(arguments), default=str))
        self.what = method_arguments(self.arguments)
        if rank == 0:
            self._make_room(replace)
        devices.barrier()
        self.finished = (self.folder / "model.pt").exists()
        if self.finished and rank == 0:
            self._drop_states()
            print(f"{self.folder} is finished: nothing to do", flush=True)

    def _make_room(self, replace: bool) -> None:
        differing = self._differing()
        if not differing:
            return
        if not replace:
            fail(
                f"{self.folder} holds a run with other flags ({', '.join(differing)}): "
                "choose another --out, or --replace to move that run aside"
            )
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.replaced-{number}")).exists():
            number += 1
        self.folder.rename(aside)
        self.folder.mkdir()
        print(
            f"{self.folder}: other flags ({', '.join(differing)}); the old run is now {aside.name}",
            flush=True,
        )

    def _differing(self) -> list[str]:
        """`--flag old -> new` for every flag in which the run in this folder differs."""
        if not (self.folder / "args.json").exists():
            return []
        old = method_arguments(read_arguments(self.folder)[0])
        return [
            f"--{name.replace('_', '-')} {old.get(name)} -> {self.what.get(name)}"
            for name in sorted({*old, *self.what})
            if old.get(name) != self.what.get(name)
        ]

    def write_config(self, setting: str, provenance: Mapping[str, Any]) -> None:
        """Write args.json, or check that the run to go on with began on the same data, device and ranks.

        Prints the run's first line: its name, `setting` (data set and network) and device.
        """
        if self.rank:
            return
        print(f"{self.name}: {setting}, {provenance['device']}", flush=True)
        path, facts = self.folder / "args.json", script_provenance(self.source)
        if not path.exists():
            files.write_json(path, {"arguments": self.arguments, "provenance": {**provenance, **facts}})
            return
        old = read_arguments(self.folder)[1]
        for name, value in {**provenance, "script": facts["script"]}.items():
            if old.get(name) != value:
                fail(f"{self.folder} began with {name} {old.get(name)}, now it is {value}: go on as it began, "
                     "or choose another --out")  # fmt: skip
        if old.get("source") != facts["source"]:
            print(
                f"warning: {self.source.name} or what it imports has changed since {self.folder} began", file=sys.stderr
            )

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """The last saved state, or None in a fresh run. The log is cut back to it.

        Stops (exit 2) where a run has begun and none of its states can be used: it never begins again in silence.
        """
        state, damaged = self._newest(device)
        begun = self._log()
        if state is None and (damaged or any(line["epoch"] > 0 for line in begun)):
            fail(f"no state of {self.folder} can be used, though it has begun: move the folder away to start again")
        if self.rank == 0:
            kept = [line for line in begun if state and line["epoch"] <= state["epoch"]]
            files.write_text(self.folder / "train.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
            if state:
                print(f"{self.name}: going on after epoch {state['epoch']}", flush=True)
        return state

    def _newest(self, device: torch.device) -> tuple[dict[str, Any] | None, bool]:
        """(the newest state of this run that is whole, whether a damaged one was met)."""
        damaged = False
        for path in (self.folder / "state.pt", self.folder / "state.previous.pt"):
            try:
                state = checkpoints.load(path, device)
                if not isinstance(state, dict) or state.get("arguments") != self.what:
                    raise files.DamagedFile(f"{path} is not of this run")
                return state, damaged
            except FileNotFoundError:
                continue
            except files.DamagedFile as error:
                damaged = True
                if self.rank == 0:
                    print(f"warning: {error}", file=sys.stderr)
        return None, damaged

    def _log(self) -> list[dict[str, Any]]:
        try:
            return files.read_lines(self.folder / "train.jsonl")
        except files.DamagedFile as error:
            fail(f"{error}: move the folder away to start again")

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
        """Load the last saved state into `model` and `optimizer`; `end_epoch` saves these two from now on.

        Returns the epoch that it was saved after, None at the start of a run. `extra` holds what else was saved.
        """
        self.model, self.optimizer = model, optimizer
        saved = self.load_state(next(model.parameters()).device)
        if saved is None:
            return None
        checkpoints.fit(model, saved["model"], self.folder)
        optimizer.load_state_dict(saved["optimizer"])
        self.extra = {
            name: one for name, one in saved.items() if name not in ("epoch", "arguments", "model", "optimizer")
        }
        return saved["epoch"]

    def diverged(self, epoch: int, *tensors: torch.Tensor) -> bool:
        """Whether a weight, a buffer or one of `tensors` is not finite; then the run is finished, see `diverge`.

        Once per epoch: a check per step would force a host-device synchronisation.
        """
        state = [one for one in self.model.state_dict().values() if isinstance(one, torch.Tensor)]
        if devices.finite_on_all_ranks([*state, *tensors]):
            return False
        self.diverge(epoch, state[0].device)
        return True

    def end_epoch(
        self, epoch: int, last: int, record: Mapping[str, Any], details: Mapping[str, Any] | None = None, **extra: Any
    ) -> None:
        """Log `record` and save model, optimizer and `extra`. Epoch 0 is the record before training.

        `details` go to train.jsonl like the record, but not on the screen.
        """
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **extra}
        self.save(epoch, {**record, **(details or {})}, state)
        if epoch:
            self.log_epoch(epoch, last, record)

    def save(self, epoch: int, record: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """End an epoch: append `record` to train.jsonl, then replace state.pt, keeping the one before it."""
        if self.rank:
            return
        files.append_line(self.folder / "train.jsonl", json.dumps({"epoch": epoch, **record}))
        path = self.folder / "state.pt"
        if path.exists():
            os.replace(path, self.folder / "state.previous.pt")
        checkpoints.save(path, {"epoch": epoch, "arguments": self.what, **state})

    def save_model(self, weights: Mapping[str, Any]) -> None:
        """Write model.pt, which marks the run as finished, and drop the states."""
        if self.rank:
            return
        checkpoints.save(self.folder / "model.pt", {"arguments": self.what, **weights})
        self._drop_states()

    def diverge(self, epoch: int, device: torch.device) -> None:
        """Finish a run whose loss or weights ceased to be finite in `epoch`, with the last finite weights.

        Looked for once an epoch, since asking the device at every step would make it wait: what the epoch did after
        its first bad step is thrown away, and the weights before it are kept.
        """
        if self.rank:
            return
        last, _ = self._newest(device)
        if last is None:
            fail(f"{self.folder} diverged in epoch {epoch}, and no earlier state can be used: move the folder away")
        print(f"{self.name}: diverged in epoch {epoch}; the weights of epoch {last['epoch']} are kept", flush=True)
        self.save_model({"model": last["model"], "epoch": last["epoch"], "diverged": True})

    def log_epoch(self, epoch: int, epochs: int, record: Mapping[str, Any]) -> None:
        """One line for an epoch."""
        if self.rank == 0:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in record.items())
            tqdm.write(f"{self.name}  epoch {epoch}/{epochs}  {numbers}")

    def _drop_states(self) -> None:
        for name in ("state.pt", "state.previous.pt"):
            (self.folder / name).unlink(missing_ok=True)


def method_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make a run another run: not where data lie, but a file of one's own in --data."""
    places = NON_METHOD_FLAGS - {"data"} if arguments.get("data_set") == "file" else NON_METHOD_FLAGS
    return {name: value for name, value in arguments.items() if name not in places}


def read_arguments(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments, provenance) of a run from its args.json. Raises FileNotFoundError; stops (exit 2) on damage."""
    try:
        found = files.read_json(Path(folder) / "args.json")
        return dict(found["arguments"]), dict(found["provenance"])
    except (files.DamagedFile, KeyError, TypeError, ValueError) as error:
        fail(f"{Path(folder) / 'args.json'} is damaged ({error}): move the folder away and train this run again")


def load_finished(folder: Path, script: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(arguments, provenance, model.pt) of a finished run of `script` ("simsiam/train.py").

    Stops (exit 2) where there is none, where it is another script's, and where its files are damaged or do not
    belong together.
    """
    folder = Path(folder)
    try:
        arguments, facts = read_arguments(folder)
        model = checkpoints.load(folder / "model.pt")
    except FileNotFoundError:
        fail(f"{folder} holds no finished run (args.json, model.pt): train it first, {script} --out {folder}")
    except files.DamagedFile as error:
        fail(f"{error}: move {folder} away and train this run again")
    if facts.get("script") != script:
        fail(f"{folder} holds a run of {facts.get('script')}, not of {script}")
    if not isinstance(model, dict) or model.get("arguments") != method_arguments(arguments):
        fail(f"{folder / 'model.pt'} is not of the run in args.json: move the folder away and train this run again")
    return arguments, facts, model


def imported_files(source: Path) -> list[Path]:
    """The script and the modules of this project that it imports, directly or not, from where they were imported."""
    root, found, names = source.absolute().parent.parent, {source.absolute()}, [source.absolute()]
    while names:
        for node in ast.walk(ast.parse(names.pop().read_bytes())):
            modules = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
            for module in modules:
                file = root.joinpath(*module.split(".")).with_suffix(".py")
                if file.is_file():
                    loaded = Path(getattr(sys.modules.get(module), "__file__", None) or file)
                    names += [] if loaded in found else [loaded]
                    found.add(loaded)
    return sorted(found)


def script_provenance(source: Path) -> dict[str, Any]:
    """Name of the script, sha256 of it and of what it imports, git commit, whether the tree is dirty, shared GPU.

    `commit` and `dirty` are None outside a clone.

    results/ does not count: make draws there after each seed, while the next one's runs begin.
    """

    def git(*words: str) -> str | None:
        if not shutil.which("git"):
            return None
        answer = subprocess.run(["git", "-C", str(source.parent), *words], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)results")
    return {
        "script": f"{source.absolute().parent.name}/{source.name}",
        "source": hashlib.sha256(b"".join(path.read_bytes() for path in imported_files(source))).hexdigest(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "runs_on_this_gpu": int(os.environ.get(SHARED, "1")),
    }

"""One run's folder: its lock, arguments, log and state, and the exact way back in after a kill.

with held(out):                                  # locked; signals and a full disk become exit codes
    run = Run(out, arguments, __file__)          # a run with other arguments is refused
    run.begin(provenance)                        # args.json
    state = run.state(device)                    # None at the start
    ...
    run.save(epoch, record, state)               # a line in train.jsonl, then state.pt
    run.finish({"model": ...})                   # model.pt; the states go
"""

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
from tqdm import tqdm

from common import checkpoints, devices, files
from common.command import PLACES
from common.exits import stop


class Run:
    """A run folder that is held by this process. Of several ranks only rank 0 writes.

    `arguments` are the parsed flags, `source` the script whose hash is recorded. Stops (exit 2) where the
    folder holds a run with other arguments (with `replace` that one is moved aside, never deleted).
    """

    def __init__(self, out: Path, arguments: Mapping[str, Any], source: str, replace: bool = False, rank: int = 0):
        self.folder, self.rank, self.source = Path(out), rank, Path(source)
        self.name = "/".join(self.folder.parts[-2:])
        self.arguments = json.loads(json.dumps(dict(arguments), default=str))
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
            stop(
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
        try:
            old = files.read_json(self.folder / "args.json")["arguments"]
        except files.Damaged as error:
            stop(f"{error}: move the folder away")
        names = sorted((set(old) | set(self.arguments)) - PLACES)
        return [
            f"--{name.replace('_', '-')} {old.get(name)} -> {self.arguments.get(name)}"
            for name in names
            if old.get(name) != self.arguments.get(name)
        ]

    def begin(self, provenance: Mapping[str, Any]) -> None:
        """Write args.json, or check that the run to go on with began on the same data, device and ranks."""
        if self.rank:
            return
        path = self.folder / "args.json"
        if not path.exists():
            facts = {**provenance, **source_facts(self.source)}
            files.write_json(path, {"arguments": self.arguments, "provenance": facts})
            return
        old = files.read_json(path)["provenance"]
        for name, value in provenance.items():
            if old.get(name) != value:
                stop(f"{self.folder} began with {name} {old.get(name)}, now it is {value}: go on as it began, "
                     "or choose another --out")  # fmt: skip
        if old.get("source") != source_facts(self.source)["source"]:
            print(f"warning: {self.source.name} has changed since {self.folder} began", file=sys.stderr)

    def state(self, device: torch.device) -> dict[str, Any] | None:
        """The last saved state, or None in a fresh run. The log is cut back to it."""
        damage = []
        for name in ("state.pt", "state.previous.pt"):
            try:
                state = checkpoints.load(self.folder / name, device)
            except FileNotFoundError:
                continue
            except files.Damaged as error:
                damage.append(str(error))
                print(f"warning: {error}", file=sys.stderr)
                continue
            if self.rank == 0:
                lines = [line for line in self._log() if line["epoch"] <= state["epoch"]]
                self._write_log(lines)
                print(f"{self.name}: going on after epoch {state['epoch']} ({name})", flush=True)
            return state
        begun = self._log()
        if damage or (begun and begun[-1]["epoch"] > 0):
            stop(f"no state of {self.folder} can be read, though it has begun: move the folder away to start again")
        if self.rank == 0:
            self._write_log([])
        return None

    def _log(self) -> list[dict[str, Any]]:
        try:
            return read_log(self.folder)
        except files.Damaged as error:
            stop(f"{error}: move the folder away to start again")

    def _write_log(self, lines: list[dict[str, Any]]) -> None:
        files.write_text(self.folder / "train.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def save(self, epoch: int, record: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """End an epoch: append `record` to train.jsonl, then replace state.pt, keeping the one before it."""
        if self.rank:
            return
        with open(self.folder / "train.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"epoch": epoch, **record}) + "\n")
            log.flush()
            os.fsync(log.fileno())
        path = self.folder / "state.pt"
        if path.exists():
            os.replace(path, self.folder / "state.previous.pt")
        checkpoints.save(path, {"epoch": epoch, **state})

    def finish(self, weights: Mapping[str, Any]) -> None:
        """Write model.pt, which marks the run as finished, and drop the states."""
        if self.rank:
            return
        checkpoints.save(self.folder / "model.pt", dict(weights))
        self._drop_states()

    def diverge(self, epoch: int, device: torch.device) -> None:
        """Finish a run whose loss or weights ceased to be finite in `epoch`, with the last finite weights.

        Looked for once an epoch, since asking the device at every step would make it wait: what the epoch did after
        its first bad step is thrown away, and the weights before it are kept.
        """
        if self.rank:
            return
        last = checkpoints.load(self.folder / "state.pt", device)
        print(
            f"{self.name}: diverged in epoch {epoch}; the weights of epoch {last['epoch']} are kept",
            flush=True,
        )
        self.finish({"model": last["model"], "epoch": last["epoch"], "diverged": True})

    def say(self, epoch: int, epochs: int, record: Mapping[str, Any]) -> None:
        """One line for an epoch."""
        if self.rank == 0:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in record.items())
            tqdm.write(f"{self.name}  epoch {epoch}/{epochs}  {numbers}")

    def _drop_states(self) -> None:
        for name in ("state.pt", "state.previous.pt"):
            (self.folder / name).unlink(missing_ok=True)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of train.jsonl; a half last line (a kill during the write) is left out. Raises files.Damaged."""
    path = Path(folder) / "train.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    try:
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError:
        raise files.Damaged(f"{path} holds a line that is not JSON") from None


def source_facts(source: Path) -> dict[str, Any]:
    """The script's sha256, the git commit and whether the tree differed from it (None outside a clone)."""

    def git(*words: str) -> str | None:
        if not shutil.which("git"):
            return None
        answer = subprocess.run(["git", "-C", str(source.parent), *words], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "source": hashlib.sha256(source.read_bytes()).hexdigest(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }

"""Processes of their own, forked from one server that has imported torch and the scripts already; scripts on ranks.

A true torchrun starts three interpreters, six seconds of importing each; one test does that all the same.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

SERVER = multiprocessing.get_context("forkserver")
SCRIPTS = [f"{paper}.{script}" for paper in ("simsiam", "conmim") for script in ("train", "eval")]
LOADED = ["torch._dynamo", *SCRIPTS, "simsiam.plot"]
SERVER.set_forkserver_preload(LOADED)  # the one place: a second call elsewhere would replace these, in silence

NORMS_IN_EVAL_MODE = """
from torch import nn
made = train.build_model
def build_model(*arguments):
    model = made(*arguments)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train = lambda mode=True, module=module: module  # from here on it stays as it is
            module.training = False
    return model
train.build_model = build_model
"""  # source of a script that has imported `train`


def end_with_what_is_not_loaded() -> None:
    """In the forked process: its exit code is how many of LOADED the server could not import."""
    sys.exit(len(set(LOADED) - set(sys.modules)))


class Finished(NamedTuple):
    returncode: int  # of the rank with the highest
    stderr: str  # all ranks' output


def run(folder: Path, script: Path, *argv: str, ranks: int = 1) -> Finished:
    """`script` with `argv` on `ranks` gloo ranks with torchrun's variables (none for one); output goes to `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"rank-{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(SERVER.Process(target=_rank, args=(str(script), argv, variables, str(log))))
        processes[-1].start()
    limit = time.monotonic() + 120
    for process in processes:
        process.join(max(0, limit - time.monotonic()))
        process.kill()  # one that hangs, or waits for a rank that died
        process.join()
    return Finished(max(abs(process.exitcode or 0) for process in processes), "".join(log.read_text() for log in logs))


def _rank(script: str, argv: tuple[str, ...], variables: dict[str, str], log: str) -> None:
    """In the forked process: the script as `python script argv` runs it."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= variables
    sys.argv, code = [script, *argv], 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        from common import devices

        if code == 0:
            devices.stop_ranks()
        sys.stdout.flush()
        sys.exit(code)

"""Run scripts in child processes, on one or several ranks, without importing torch each time.

The children are forked from a server that has already imported torch and the scripts. A real torchrun needs about six
seconds of imports per process; only one test uses it.
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
PRELOADED = ["torch._dynamo", *SCRIPTS, "simsiam.plot"]
SERVER.set_forkserver_preload(PRELOADED)  # call it here only: a second call would silently replace this list

# Appended to scripts that have imported `train`: batch norms stay in eval mode, so that ranks do not affect them.
NORMS_IN_EVAL_MODE = """
from torch import nn
real_build_model = train.build_model
def build_model(*arguments):
    model = real_build_model(*arguments)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train = lambda mode=True, module=module: module
            module.training = False
    return model
train.build_model = build_model
"""


def exit_with_missing_imports() -> None:
    """Exit with the number of PRELOADED modules that the server could not import. Runs in the child process."""
    sys.exit(len(set(PRELOADED) - set(sys.modules)))


class Finished(NamedTuple):
    returncode: int  # the highest of all ranks
    stderr: str  # stdout and stderr of all ranks


def run(folder: Path, script: Path, *argv: str, ranks: int = 1) -> Finished:
    """Run `script` with `argv` on `ranks` gloo ranks; the output goes to files in `folder`.

    Several ranks get torchrun's environment variables, a single rank gets none.
    """
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"rank-{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(SERVER.Process(target=run_as_rank, args=(str(script), argv, variables, str(log))))
        processes[-1].start()
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()  # it may hang, or wait for a rank that died
        process.join()
    return Finished(max(abs(process.exitcode or 0) for process in processes), "".join(log.read_text() for log in logs))


def run_as_rank(script: str, argv: tuple[str, ...], variables: dict[str, str], log: str) -> None:
    """Run the script as `python script argv` does. Called in the child process."""
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
            devices.destroy_process_group()
        sys.stdout.flush()
        sys.exit(code)

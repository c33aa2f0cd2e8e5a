"""Atomic writes, damaged files, safe loading, the lock and the provenance of a run."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from common import checkpoints, files, lock
from common.cli import EXIT_INTERRUPTED
from common.lock import run_lock
from common.run import imported_files, script_provenance
from common.study import slots


def test_failed_write_keeps_the_old_file_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["metrics.json"]
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})


def make_fsync_fail(monkeypatch, number: int, times: int) -> None:
    """Let the next `times` calls of fsync raise OSError `number`, and remove the wait before the retry."""
    failures, real = [None] * times, os.fsync

    def fsync(descriptor):
        if failures:
            failures.pop()
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)


def test_temporary_error_is_retried_once_and_full_disk_is_not(tmp_path, monkeypatch, capsys):
    path = tmp_path / "train.jsonl"
    files.append_line(path, '{"epoch": 0}')
    make_fsync_fail(monkeypatch, errno.EIO, 1)
    files.append_line(path, '{"epoch": 1}')
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n' and "retrying once" in capsys.readouterr().err
    make_fsync_fail(monkeypatch, errno.EIO, 1)
    files.write_text(tmp_path / "metrics.json", "{}")
    assert sorted(os.listdir(tmp_path)) == ["metrics.json", "train.jsonl"]
    for number, times in ((errno.EIO, 2), (errno.ENOSPC, 1)):
        make_fsync_fail(monkeypatch, number, times)
        with pytest.raises(OSError):
            files.append_line(path, '{"epoch": 2}')
        assert path.read_text().count("\n") == 2  # the failed line left nothing behind


def test_damaged_checkpoint_is_detected(tmp_path):
    path = tmp_path / "state.pt"
    checkpoints.save(path, {"epoch": 3, "model": {"w": torch.arange(5000.0)}})
    intact = path.read_bytes()
    assert checkpoints.load(path)["epoch"] == 3
    for fraction in (0.0, 0.01, 0.5, 0.99):
        path.write_bytes(intact[: int(len(intact) * fraction)])
        with pytest.raises(files.DamagedFile, match=r"state\.pt"):
            checkpoints.load(path)
    start = intact.index(torch.arange(5000.0).numpy().tobytes()[:400])
    flipped = bytearray(intact)
    flipped[start + 800] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(files.DamagedFile, match="checksum"):
        checkpoints.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "absent.pt")


class Malicious:
    """Creates the folder `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_malicious_checkpoint_is_rejected_and_not_executed(tmp_path):
    torch.save({"model": Malicious(tmp_path / "marker")}, tmp_path / "model.pt")
    with pytest.raises(files.DamagedFile):
        checkpoints.load(tmp_path / "model.pt")
    assert not (tmp_path / "marker").exists()


def test_only_one_process_can_lock_a_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    code = "import sys, time\nfrom common.lock import run_lock\n"
    code += "with run_lock(sys.argv[1]):\n print('locked', flush=True)\n time.sleep(60)"
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert owner.stdout.readline() == "locked\n"
    with pytest.raises(SystemExit) as end, run_lock(folder):
        pass
    assert end.value.code == 2 and f"pid {owner.pid}" in capsys.readouterr().err
    owner.terminate()
    assert owner.wait() == EXIT_INTERRUPTED
    with run_lock(folder):  # released when its owner ended
        assert folder.is_dir()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_file_locks_is_an_error(number, tmp_path, monkeypatch, capsys):
    """Neither a traceback nor, with GPUS, a wait that never ends."""

    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    waiting = open(tmp_path / "x.lock", "w")  # noqa: SIM115
    for acquire in (
        lambda: lock.acquire_lock(tmp_path / "run"),
        lambda: slots.acquire_slot(["0"], tmp_path / "slots"),
        lambda: lock.wait_for_lock(waiting, "the image cache"),
    ):
        with pytest.raises(SystemExit) as end:
            acquire()
        printed = capsys.readouterr().err
        assert end.value.code == 2 and os.strerror(number) in printed and "with file locks" in printed


def test_a_wait_for_another_process_is_announced(tmp_path, monkeypatch, capsys):
    """Decoding can take an hour, and a free GPU a day."""

    attempts = iter([False, False, True])

    def taken_twice(file, flags):
        if flags & lock.fcntl.LOCK_NB and not next(attempts):
            raise OSError(errno.EAGAIN, "taken")

    monkeypatch.setattr(lock.fcntl, "lockf", taken_twice)
    with open(tmp_path / "x.lock", "w") as file:
        lock.wait_for_lock(file, "the image cache x.npy")
    assert capsys.readouterr().err == "the image cache x.npy is being written by another process: waiting for it\n"
    assert slots.acquire_slot(["0"], tmp_path / "slots") == "0"
    assert capsys.readouterr().err == "waiting for a free GPU: GPUS='0' are all in use\n"


def test_slots_in_a_folder_that_cannot_be_written_are_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        slots.acquire_slot(["0"], tmp_path / "file/slots")
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "cannot be written (Not a directory)" in printed and printed.count("\n") == 1
    assert slots.acquire_slot(["a/b"], tmp_path / "slots") == "a/b"


@pytest.mark.parametrize(("number", "ignored"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_folders_is_accepted(number, ignored, tmp_path, monkeypatch):
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    if ignored:
        files.write_json(tmp_path / "a.json", 1)
    else:
        with pytest.raises(OSError, match="Input/output"):
            files.write_json(tmp_path / "a.json", 1)
    assert files.read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize(("code", "status", "words"), [
    ("while True: print('x' * 9999)", EXIT_INTERRUPTED, "standard output was closed"),
    ("import shutil; shutil.rmtree(sys.argv[1]); open(sys.argv[1] + '/x', 'w')", 4, "was removed while its run"),
])  # fmt: skip
def test_a_closed_pipe_and_a_removed_folder_end_a_run_with_one_sentence(code, status, words, tmp_path):
    script = f"import sys\nfrom common.lock import run_lock\nwith run_lock(sys.argv[1]):\n {code}"
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    run.stdout.close()
    printed = run.stderr.read()
    assert run.wait() == status and words in printed and printed.count("\n") == 1, printed


def script(code: str, **streams) -> subprocess.Popen:
    """Start a script that has a command line. Its output is buffered, as in a pipe."""
    code = f"import sys, time\nfrom common.cli import Parser\nParser('A script.').parse_args([])\n{code}"
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment, **streams)


def test_the_end_of_the_output_may_be_cut_by_head():
    process = script("print('first', flush=True); time.sleep(0.5); print('second')", stdout=subprocess.PIPE)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


def test_ctrl_c_in_a_script_without_a_run_prints_one_sentence():
    process = script("print('ready', flush=True); time.sleep(60)", stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[1]
    assert process.returncode == -signal.SIGINT and printed == "error: interrupted; run the same command again\n"


def test_a_full_disk_at_the_start_of_a_run_exits_with_code_4(tmp_path):
    code = f"from common.lock import run_lock\nwith run_lock({str(tmp_path / 'run')!r}): pass"
    command = ["bash", "-c", 'ulimit -f 0; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr


@pytest.mark.parametrize("module", ["rules", "cost"])
def test_a_terminal_without_umlauts_is_no_error(module, tmp_path):
    command = [sys.executable, "-m", f"common.study.{module}", "PAPERS=bsa", "SCALE=demo", f"RUNS={tmp_path}/ä"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    if module == "rules":  # make includes this file
        assert Path(os.fsdecode(done.stdout).strip()).is_file()


def test_lock_is_released_when_its_owner_dies_though_a_worker_survives(tmp_path):
    folder = tmp_path / "run"
    code = "import os, sys, time\nfrom common.lock import run_lock\n"
    code += "with run_lock(sys.argv[1]):\n worker = os.fork()\n"
    code += " print(worker, flush=True) if worker else None\n time.sleep(60)"
    command = [sys.executable, "-c", code, str(folder)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)})
    worker = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    try:
        os.kill(worker, 0)  # raises an error if the worker is dead
        (folder / ".state.pt.1.part").write_text("half")
        with run_lock(folder):
            assert os.listdir(folder) == []  # the temporary file of the dead process is removed
    finally:
        os.kill(worker, signal.SIGKILL)


def test_full_disk_exits_with_code_4(tmp_path, capsys):
    with pytest.raises(SystemExit) as end, run_lock(tmp_path / "run"):
        raise OSError(28, "No space left on device")
    assert end.value.code == 4 and "No space left" in capsys.readouterr().err


def test_incomplete_last_log_line_is_ignored_and_other_damage_is_reported(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    assert [line["epoch"] for line in files.read_lines(path)] == [0, 1]
    path.write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    with pytest.raises(files.DamagedFile, match=r"train\.jsonl, line 2: not a JSON object"):
        files.read_lines(path)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\r\nb", ["a", "b"]),
        ("a\u2028b\x0cc\n\nd\n \n\n".encode(), ["a\u2028b\x0cc", "", "d"]),
        (b"", []),
    ],
)
def test_only_line_feeds_end_a_line_and_empty_last_lines_are_dropped(content, lines, tmp_path):
    (tmp_path / "names.txt").write_bytes(content)
    assert files.read_text_lines(tmp_path / "names.txt") == lines


def test_the_list_of_studies_may_be_cut_by_head():
    words = ["help", "PAPERS=simsiam conmim cocord bsa seqvcr", "SCALE=demo"]
    command = [sys.executable, "-m", "common.study.rules", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `head` does when it has its lines
    printed = process.stderr.read()
    assert process.wait() == 0 and printed == "", printed


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_text_in_another_encoding_is_reported(encoding, tmp_path):
    (tmp_path / "names.txt").write_bytes("Ärger\n".encode(encoding))
    with pytest.raises(files.DamagedFile, match=r"names\.txt is not a UTF-8 text \(byte 0\): save it as UTF-8"):
        files.read_text_lines(tmp_path / "names.txt")


def test_no_unsafe_loading_or_shell_commands_in_the_source():
    banned = ("pickle", "weights_only=" + "False", "allow_pickle=" + "True", "shell=" + "True", "os." + "system")
    packages = ("common", "simsiam", "conmim", "cocord", "bsa", "seqvcr")
    paths = [path for package in packages for path in ROOT.glob(f"{package}/**/*.py")]
    assert {path.relative_to(ROOT).parts[0] for path in paths} == set(packages)
    for path in paths:
        text = path.read_text().replace("unpickling", "").replace("unpickled", "").replace("allow_pickle=False", "")
        assert not [word for word in banned if word in text], path
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_changed_code_makes_the_tree_dirty_and_changed_results_do_not(tmp_path):
    assert script_provenance(Path(__file__))["source"]
    assert script_provenance(new(tmp_path, "x/train.py"))["dirty"] is None
    new(tmp_path, "results/demo/page.md")
    new(tmp_path, "common/run.py")
    author = ["-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    for name, dirty in (("x/other.py", False), ("results/demo/page.md", False), ("common/run.py", True)):
        new(tmp_path, name, "changed")
        provenance = script_provenance(tmp_path / "x/train.py")
        assert provenance["dirty"] is dirty and len(provenance["commit"]) == 40, name


def new(folder: Path, name: str, text: str = "") -> Path:
    """Write `text` to the file `name` in `folder`. Returns its path."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


SCRIPTS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.glob("*/*.py")
    if path.parent.name in ("bsa", "cocord", "conmim", "seqvcr", "simsiam") and "__main__" in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_put_their_clone_first_on_sys_path(script):
    lines = (ROOT / script).read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if re.match(r"(from|import) (common|bsa|cocord|conmim|se|si)", line))
    above = [line for line in lines[:first] if line]
    assert above[-2].startswith("if not __package__:")
    assert above[-1] == "    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"


@pytest.mark.parametrize("script", ["bsa/train.py", "simsiam/plot.py", "seqvcr/tasks.py"])
def test_scripts_do_not_import_another_clone(script, tmp_path):
    """Run scripts from another directory, with the packages of another clone on PYTHONPATH."""
    for package in ("common", "bsa", "simsiam"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong clone')\n")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, ROOT / script, "--help"], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_source_hash_covers_the_script_and_its_imports(tmp_path):
    paths = {path.relative_to(ROOT).as_posix() for path in imported_files(ROOT / "simsiam/train.py")}
    assert {"simsiam/train.py", "simsiam/net.py", "common/run.py", "common/seeding.py", "common/files.py"} <= paths
    assert not any(path.startswith(("common/study", "simsiam/eval", "bsa")) for path in paths)
    digests = []
    for clone, content in (("a", ""), ("b", ""), ("c", "changed = 1")):
        new(tmp_path, f"{clone}/x/train.py").write_text("from common import part")
        new(tmp_path, f"{clone}/common/part.py").write_text(content)
        digests.append(script_provenance(tmp_path / clone / "x/train.py")["source"])
    assert digests[0] == digests[1] != digests[2]

"""Two runs in one folder: one does the work, the other is told; a dead one's folder is taken over, a live one's never."""

import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from short_runs import PROGRAM, begin, overrides, steps, trace

from pipeline.console import InputError
from trainer import lock
from trainer.config_file import load_config
from trainer.distributed import ALONE
from trainer.train import resume, run

LONG = {"optim.samples": 2_000_000, "run.save_every_samples": 160}


def launch(*words: str | Path) -> subprocess.Popen:
    return subprocess.Popen([PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(ready, what: str) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def refused(process: subprocess.Popen, folder: Path, holder: subprocess.Popen) -> None:
    """It ended with exit 2 and one line, which names the folder and the process that works there."""
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors.count("\n")) == (2, 1), errors
    assert f"{folder} is in use by a run, process {holder.pid} on" in errors


def pairs(scenes: Path, folder: Path) -> None:
    """`run` beside `run`, then `resume` beside the one that works, then kill -9 of that, and `resume` in its place."""
    words = ["run", "scenes-tiny", *(w for o in overrides(scenes, folder, **LONG) for w in ("--set", o))]
    both = [launch(*words), launch(*words)]
    try:
        until(lambda: any(process.poll() is not None for process in both), "none of two runs was refused")
        loser, winner = sorted(both, key=lambda process: process.poll() is None)
        refused(loser, folder, winner)
        until(lambda: steps(folder) >= 5, "the other run does not work")
        both.append(launch("resume", folder))
        refused(both[-1], folder, winner)
        at = steps(folder)
        until(lambda: steps(folder) > at, "the run did not outlive it")
        winner.kill()
        winner.communicate()
        at = steps(folder)
        both.append(next_one := launch("resume", folder))
        until(lambda: steps(folder) > at + 5, "the dead run's folder was not taken over")
        next_one.send_signal(signal.SIGTERM)
        _, errors = next_one.communicate(timeout=100)
        assert next_one.returncode == 0, errors
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert [row[0] for row in trace(folder)] == list(range(1, steps(folder) + 1))
    assert not (folder / lock.LOCK).exists()


HOLD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from contextlib import nullcontext
import trainer.lock as lock
lock.EVERY = 0.1
with lock.alone_in(Path(sys.argv[1]), SimpleNamespace(rank=0, agreeing=nullcontext)):
    print("held", flush=True)
    time.sleep(100)
"""


def holding(folder: Path) -> subprocess.Popen:
    """A process that holds the folder as a run does."""
    process = subprocess.Popen([PROGRAM.parent / "python", "-c", HOLD, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_beside_a_live_run_others_are_refused_and_a_dead_one_is_replaced(scenes, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "new"
    begin(scenes, folder, **{"optim.samples": 32})
    for place, again in ((folder, lambda: resume(str(folder))),
                         (other, lambda: run(load_config("scenes-tiny", overrides(scenes, other, **{"optim.samples": 32}))))):
        holder = holding(place)
        with pytest.raises(InputError, match=f"{place} is in use by a run, process {holder.pid} on"):
            again()
        holder.kill()
        holder.communicate()
        assert again() == place / "checkpoints" / f"{32:012d}"
        assert not (place / lock.LOCK).exists()


@pytest.mark.slow
def test_ten_pairs_of_runs_and_ten_of_run_and_resume(scenes, tmp_path, capsys):
    for number in range(10):
        pairs(scenes, tmp_path / f"run{number}")
    with capsys.disabled():
        print("\n10 × run beside run, 10 × resume beside run: one works, one is refused; 10 of 10 killed ones taken over")


def elsewhere(folder: Path, count: int) -> None:
    """What a run on another machine has in its lock."""
    folder.mkdir(exist_ok=True)
    (folder / lock.LOCK).write_text(json.dumps({"process": 7, "host": "node9", "machine": "x", "since": 1, "count": count}))


def test_another_machine_s_run_is_taken_over_only_when_it_is_silent(tmp_path, monkeypatch):
    """As on a shared disk whose locks do not reach other machines: here nobody holds the system's lock."""
    monkeypatch.setattr(lock, "SILENT", 0.6)
    elsewhere(tmp_path, 0)
    monkeypatch.setattr(lock.time, "sleep", lambda _: elsewhere(tmp_path, 1))  # it counts on
    with pytest.raises(InputError, match="process 7 on node9"), lock.alone_in(tmp_path, ALONE):
        pytest.fail("a live run's folder")
    monkeypatch.undo()
    monkeypatch.setattr(lock, "SILENT", 0.3)
    for text in ((tmp_path / lock.LOCK).read_text(), "\0" * 200):  # also what a power cut tore
        (tmp_path / lock.LOCK).write_text(text)
        with lock.alone_in(tmp_path, ALONE):
            pass
        assert not (tmp_path / lock.LOCK).exists()
        tmp_path.mkdir(exist_ok=True)


def test_a_folder_on_a_disk_without_locks_is_held_by_the_count(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "EVERY", 0.1)
    monkeypatch.setattr(lock, "SILENT", 1.0)
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    with (lock.alone_in(tmp_path / "run", ALONE), pytest.raises(InputError, match="is in use"),
          lock.alone_in(tmp_path / "run", ALONE)):
        pytest.fail("a live run's folder")
    assert not (tmp_path / "run").exists(), "a run that did not begin leaves something"


def test_a_run_that_was_suspended_and_replaced_ends(tmp_path):
    process = holding(tmp_path / "run")
    process.send_signal(signal.SIGSTOP)
    elsewhere(tmp_path / "run", 5)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("\n")) == (1, 1), errors
    assert "process 7 on node9 has taken over" in errors
    assert (tmp_path / "run" / lock.LOCK).exists(), "it removed the other's lock"


@pytest.mark.parametrize("lives", [True, False])
def test_a_lock_that_a_disk_keeps_for_another_machine_is_taken_over_when_its_run_is_silent(tmp_path, monkeypatch, lives):
    """As on a shared disk whose server still holds the lock of a machine that died: here another handle holds it."""
    monkeypatch.setattr(lock, "EVERY", 0.1)
    monkeypatch.setattr(lock, "SILENT", 0.5)
    elsewhere(tmp_path, 0)
    handle = os.open(tmp_path / lock.LOCK, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if lives:
            monkeypatch.setattr(lock.time, "sleep", lambda _: elsewhere(tmp_path, 1))
            with pytest.raises(InputError, match="process 7 on node9"), lock.alone_in(tmp_path, ALONE):
                pytest.fail("a live run's folder")
        else:
            with lock.alone_in(tmp_path, ALONE):
                assert json.loads((tmp_path / lock.LOCK).read_text())["process"] == os.getpid()
    finally:
        os.close(handle)


def test_a_live_run_is_found_where_locks_do_not_reach_from_mount_to_mount_of_a_machine(tmp_path, monkeypatch):
    """As between two containers: each gets the system's lock."""
    monkeypatch.setattr(lock, "EVERY", 0.1)
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)
    with (lock.alone_in(tmp_path / "run", ALONE), pytest.raises(InputError, match=f"is in use by a run, process {os.getpid()}"),
          lock.alone_in(tmp_path / "run", ALONE)):
        pytest.fail("a live run's folder")


def test_a_run_counts_on_after_an_error_of_its_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "EVERY", 0.05)
    read, failed = lock._read, []

    def stale(run: Path) -> dict:
        if len(failed) < 2:
            failed.append(run)
            raise OSError(116, "Stale file handle")
        return read(run)

    with lock.alone_in(tmp_path / "run", ALONE):
        monkeypatch.setattr(lock, "_read", stale)
        until(lambda: len(failed) == 2, "it did not count")
        before = (tmp_path / "run" / lock.LOCK).read_bytes()
        time.sleep(0.3)
        assert (tmp_path / "run" / lock.LOCK).read_bytes() != before


def test_a_folder_that_was_there_before_the_run_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with lock.alone_in(tmp_path / name, ALONE):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

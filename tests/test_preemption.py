"""What the machine asks of a run, and what it takes away: signals, the clock, a mirror, a dead process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import command
from short_runs import PROGRAM, TORCHRUN, begin, overrides, trace, weights
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pipeline.console import InputError, WorkFailed
from trainer import checkpoint, heartbeat
from trainer.config_file import load_config
from trainer.mirror import Mirror
from trainer.orders import Orders
from trainer.train import train
from trainer.training import Training, restored, start


def started(scenes: Path, folder: Path, world: int = 1, **more) -> subprocess.Popen:
    """A run in the background that has taken a few steps."""
    words = [PROGRAM, "run", "scenes-tiny", *(w for o in overrides(scenes, folder, **more) for w in ("--set", o))]
    launch = [] if world == 1 else [PROGRAM.parent / TORCHRUN[0], *TORCHRUN[1:], str(world), "--no-python"]
    process = subprocess.Popen([*launch, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    until(lambda: (folder / "metrics.jsonl").is_file() and len(trace(folder)) >= 5, process)
    return process


def until(ready, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG = {"optim.samples": 200_000, "run.save_every_samples": 200_000}


def test_sigterm_saves_stops_and_says_so(scenes, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = started(scenes, stopped, **LONG)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == 0
    assert "SIGTERM: saving a checkpoint" in errors
    assert f"uniclip-train resume {stopped}" in out
    at = checkpoint.read_state(checkpoint.find(stopped)).cursor.samples_seen
    assert at == trace(stopped)[-1][1] > 0
    train(*(resumed := restored(stopped)), Until(resumed[1], at + 160))
    config = load_config("scenes-tiny", overrides(scenes, whole, **LONG))
    t = start(config)
    train(config, t, Until(t, at + 160))
    assert trace(stopped) == trace(whole)
    assert weights(stopped) == weights(whole)


class Until(Orders):
    """An order to stop that comes at a number of samples."""

    def __init__(self, t: Training, samples: int):
        self._t, self._samples = t, samples
        super().__init__()

    @property
    def stop(self) -> bool:
        return self._t.cursor.samples_seen + 16 >= self._samples

    @stop.setter
    def stop(self, _: bool) -> None:
        """It is a matter of samples alone."""


def test_sigterm_stops_all_ranks_with_one_checkpoint(scenes, tmp_path):
    process = started(scenes, tmp_path / "run", 2, **LONG)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGTERM)  # one rank alone is told
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert checkpoint.read_state(checkpoint.find(tmp_path / "run")).cursor.samples_seen > 0


def test_sigusr1_saves_and_goes_on(scenes, tmp_path):
    folder = tmp_path / "run"
    process = started(scenes, folder, **LONG)
    process.send_signal(signal.SIGUSR1)
    until(lambda: (folder / "checkpoints" / checkpoint.LATEST).read_text() != f"{0:012d}", process)
    at = len(trace(folder))
    until(lambda: len(trace(folder)) > at + 3, process)
    process.kill()
    process.communicate()


def test_the_clock_on_the_wall_saves(scenes, tmp_path):
    folder = tmp_path / "run"
    process = started(scenes, folder, **LONG | {"run.save_every_minutes": 0.02, "run.keep": 3})
    until(lambda: len(list((folder / "checkpoints").glob("*/state.json"))) == 3, process)
    process.kill()
    process.communicate()
    checkpoint.read_state(checkpoint.find(folder))


def test_a_mirror_holds_whole_checkpoints_and_a_run_goes_on_from_it(scenes, tmp_path):
    url, lost, again, whole = f"file://{tmp_path}/mirror", tmp_path / "lost", tmp_path / "again", tmp_path / "whole"
    begin(scenes, whole)
    begin(scenes, lost, **{"run.mirror": url, "optim.samples": 240})
    names = sorted(p.name for p in (tmp_path / "mirror" / "checkpoints").iterdir())
    assert names == ["000000000192", "000000000240", "latest"]
    for name in names[:2]:
        assert checkpoint.read_state(tmp_path / "mirror" / "checkpoints" / name)
    mirror = Mirror(url)
    mirror.fetch(again)
    assert trace(again) == trace(lost)
    config, t = restored(again)
    assert t.cursor.samples_seen == 240
    assert weights(again) == weights(lost)
    done = command("uniclip-train", "resume", url, "--folder", tmp_path / "third")
    assert done.returncode == 0, done.stderr
    assert trace(tmp_path / "third") == trace(lost)
    with pytest.raises(InputError, match="run.mirror .* already holds a run"):
        begin(scenes, tmp_path / "other", **{"run.mirror": url})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(WorkFailed, match="did not take"):
        patch.setattr(mirror._fs, "put_file", lambda *_: (_ for _ in ()).throw(OSError("it is gone")))
        mirror.copy(lost / "checkpoints" / names[1], 2)  # a run that went back writes its own of this number
    assert mirror.newest() == names[0], "what is half replaced is not the latest"
    mirror.copy(lost / "checkpoints" / names[1], 2)
    assert mirror.newest() == names[1]
    mirror.copy(lost / "checkpoints" / names[0], 1)  # as of a run that went back to it
    assert sorted(p.name for p in (tmp_path / "mirror" / "checkpoints").iterdir()) == [names[0], "latest"]
    mirror.fetch(tmp_path / "fourth")
    assert restored(tmp_path / "fourth")[1].cursor.samples_seen == 192
    with pytest.raises(InputError, match="stands at 000000000240 samples"):
        mirror.fetch(again)
    with pytest.raises(InputError, match="holds no checkpoint"):
        Mirror("memory://nothing").fetch(tmp_path / "x")
    with pytest.raises(InputError, match="run.mirror"):
        Mirror("nosuch://bucket")


def test_a_mirror_that_cannot_be_read_is_one_clear_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    torn = tmp_path / "torn" / "checkpoints"
    torn.mkdir(parents=True)
    (torn / "latest").write_text("000000000096")  # and no such checkpoint
    for url in (f"ftp://127.0.0.1:{port}/run", f"file://{tmp_path}/torn"):
        done = command("uniclip-train", "resume", url, "--folder", tmp_path / "here")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert f"run.mirror {url} cannot be read (" in done.stderr and "check the URL" in done.stderr
    with pytest.raises(InputError, match=f"run.mirror file://{tmp_path}/torn cannot be read .FileNotFoundError"):
        Mirror(f"file://{tmp_path}/torn").fetch(tmp_path / "run")


def test_a_mirror_that_cannot_be_written_ends_the_run_with_one_line(scenes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkFailed, match=r"run.mirror .*; the checkpoint in .* is whole"):
        begin(scenes, tmp_path / "run", **{"run.mirror": f"file://{tmp_path}/file/mirror"})
    checkpoint.read_state(checkpoint.find(tmp_path / "run"))


def test_a_mirror_that_is_away_for_a_while_does_not_end_the_run(scenes, tmp_path, capsys):
    folder, mirror = tmp_path / "run", tmp_path / "mirror"
    config = load_config("scenes-tiny", overrides(scenes, folder, **{"run.mirror": f"file://{mirror}", "run.keep": 9}))
    t = start(config)

    class Away(Orders):
        """Where the mirror was there is a file from 96 to 192 samples."""

        @property
        def stop(self) -> bool:
            if t.cursor.samples_seen == 96 and mirror.is_dir():
                mirror.rename(tmp_path / "kept")
                mirror.write_text("")
            if t.cursor.samples_seen == 192 and mirror.is_file():
                time.sleep(0.2)
                mirror.unlink()
                (tmp_path / "kept").rename(mirror)
            return False

        @stop.setter
        def stop(self, _: bool) -> None: ...

    train(config, t, Away())
    assert "warning: run.mirror" in capsys.readouterr().out
    assert checkpoint.read_state(checkpoint.find(mirror)).cursor.samples_seen == 480


SLOW = """
import sys, time
from functools import partial
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
import trainer.train
from trainer.config_file import load_config
from trainer.distributed import process_group
from trainer.training import start

class Slow(LocalFileSystem):
    protocol = "slow"

    def put_file(self, here, there, **options):
        time.sleep(7 * here.endswith("model.safetensors"))
        super().put_file(here, there, **options)

    def get_file(self, there, here, **options):
        time.sleep(7 * there.endswith("model.safetensors"))
        super().get_file(there, here, **options)

fsspec.register_implementation("slow", Slow)
trainer.train.process_group = partial(process_group, timeout_minutes=4 / 60)
if sys.argv[1] == "resume":
    trainer.train.resume(sys.argv[2], Path(sys.argv[3]))
else:
    trainer.train.run(load_config("scenes-tiny", sys.argv[1:]))
"""


def test_no_rank_waits_for_a_mirror_that_takes_longer_than_a_collective_may(scenes, tmp_path):
    folder, mirror = tmp_path / "run", tmp_path / "mirror"
    (tmp_path / "slow.py").write_text(SLOW)
    more = {"run.mirror": f"slow://{mirror}", "optim.samples": 96, "run.save_every_samples": 16, "run.keep": 1}
    done = command(*TORCHRUN, "2", tmp_path / "slow.py", *overrides(scenes, folder, **more))
    assert done.returncode == 0, done.stderr
    assert len(trace(folder)) == 6
    for place in (folder, mirror):
        assert sorted(path.name for path in (place / "checkpoints").iterdir()) == ["000000000096", "latest"]
        checkpoint.read_state(checkpoint.find(place))
    shutil.rmtree(folder)
    done = command(*TORCHRUN, "2", tmp_path / "slow.py", "resume", f"slow://{mirror}", folder)
    assert done.returncode == 0, done.stderr
    assert weights(folder) == weights(mirror)


@pytest.mark.parametrize("launch", ["torchrun", "alone"])
def test_a_dead_rank_ends_the_run_and_is_named(scenes, tmp_path, launch):
    """Under torchrun the agent names it; started one by one, as on nodes of their own, the other ranks do."""
    folder = tmp_path / "run"
    words = [PROGRAM, "run", "scenes-tiny", *(w for o in overrides(scenes, folder, **LONG) for w in ("--set", o))]
    if launch == "torchrun":
        process = started(scenes, folder, 4, **LONG)
        workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                                      text=True).stdout.split()]
        rank = {int(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[1].split(b"\0")[0]): pid for pid in workers}
        os.kill(rank[2], signal.SIGKILL)
        begun = time.monotonic()
        _, errors = process.communicate(timeout=100)
        assert time.monotonic() - begun < 60
        assert process.returncode != 0
        assert "exitcode  : -9" in errors and "rank      : 2" in errors
        return
    port = str(20_000 + os.getpid() % 20_000)
    processes = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "RANK": str(r), "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for r in range(3)]
    until(lambda: (folder / "metrics.jsonl").is_file() and len(trace(folder)) >= 5, processes[0])
    processes[1].kill()
    begun = time.monotonic()
    errors = {r: processes[r].communicate(timeout=100)[1] for r in (0, 2)}
    assert time.monotonic() - begun < 60
    for r in (0, 2):
        assert processes[r].returncode == 1, errors[r]
        assert f"rank 1 (process {processes[1].pid} on" in errors[r], errors[r]
    processes[1].communicate()


def test_silence_counts_only_while_this_process_lives_itself(monkeypatch):
    """After SIGCONT, or on a machine that slept, nobody has beaten for long, and all are there."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(heartbeat, "EVERY", 60.0)
    monkeypatch.setattr(heartbeat, "SILENT", 150.0)
    here = heartbeat.Heartbeat(0, 2)
    here._put("who1", "rank 1")
    here._put("beat1", "7")
    beats = here._beats()
    assert [next(beats) for _ in range(3)] == ["", "", ""]
    assert next(beats) == "rank 1 has been silent for 150 s"
    here.close()


def test_metrics_are_strict_json(scenes, tmp_path):
    begin(scenes, tmp_path / "run", **{"optim.samples": 32})
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

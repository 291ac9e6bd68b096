"""Files that start a run elsewhere: the batch script really run, on two machines that are this one; the container's lines."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from short_runs import PROGRAM, overrides, steps, trace

from trainer import checkpoint

SBATCH, CONTAINER = ROOT / "tools/launch/train.sbatch", ROOT / "tools/launch/Containerfile"
SLURM = {
    "srun": """#!/bin/bash
[ "$1 $2" = "--cpus-per-task=3 --label" ] && shift 2 || exit 9
for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do SLURM_NODEID=$n "$@" & machines+=($!); done
trap 'kill -USR1 "${machines[@]}"' USR1
worst=0
for machine in "${machines[@]}"; do
    while :; do wait "$machine"; code=$?; kill -0 "$machine" 2>/dev/null || break; done
    ((code > worst)) && worst=$code
done
exit "$worst"
""",
    "scontrol": """#!/bin/bash
case $1 in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""}


class Cluster:
    """Two machines with a process each, on loopback; srun and scontrol stand in for Slurm."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.requeued, self.starts = folder, folder / "run", folder / "requeued", 0
        self.started: list[subprocess.Popen] = []
        (folder / "bin").mkdir()
        for name, text in SLURM.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, *words: str) -> subprocess.Popen:
        """What Slurm does when the job's turn comes, the first time or after it was queued again."""
        environment = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "REQUEUED": str(self.requeued),
                       "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "here,here",
                       "SLURM_RESTART_COUNT": str(self.starts), "PROCESSES": "1", "UNICLIP_BIN": str(PROGRAM.parent),
                       "SLURM_CPUS_PER_TASK": "3", "UNICLIP_SRUN": "--label"}
        self.starts += 1
        process = subprocess.Popen(["bash", SBATCH, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=environment)
        self.started.append(process)
        return process

    def times_requeued(self) -> int:
        return len(self.requeued.read_text().split()) if self.requeued.is_file() else 0

    def at(self) -> int:
        """Samples seen at the latest checkpoint."""
        return checkpoint.read_state(checkpoint.find(self.run)).cursor.samples_seen

    def workers(self) -> list[int]:
        """Processes of the run, on both machines."""
        found = []
        for place in Path("/proc").iterdir():
            if place.name.isdigit():
                try:
                    words, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
                except OSError:
                    continue
                if str(self.run).encode() in words and b"\0LOCAL_RANK=" in environment:
                    found.append(int(place.name))
        return found


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    for process in cluster.started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
    assert not cluster.workers()


def until(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begun(cluster: Cluster, scenes: Path) -> list[str]:
    settings = [*overrides(scenes, cluster.run), "optim.samples=1600", "run.save_every_samples=160"]
    return [str(cluster.run), "scenes-tiny", *(word for one in settings for word in ("--set", one))]


def ended(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


def test_the_batch_script_saves_is_queued_again_and_ends(cluster, scenes):
    words = begun(cluster, scenes)
    process = cluster.start(*words)
    until(lambda: steps(cluster.run) >= 5, process)
    process.send_signal(signal.SIGUSR1)  # the time limit is near
    assert "queued again" in ended(process)
    stopped = cluster.at()
    assert 0 < stopped < 1600
    assert cluster.times_requeued() == 1
    assert f"resuming {cluster.run} at {stopped:,} samples" in ended(cluster.start(*words))
    assert cluster.at() == 1600
    assert cluster.times_requeued() == 1
    assert [line[1] for line in trace(cluster.run)] == list(range(16, 1601, 16))


@pytest.mark.slow
def test_the_batch_script_after_a_lost_process_and_when_cancelled(cluster, scenes):
    words = begun(cluster, scenes)
    process = cluster.start(*words)
    until(lambda: steps(cluster.run) >= 25, process)
    os.kill(cluster.workers()[0], signal.SIGKILL)
    assert "queued again" in ended(process)
    assert cluster.times_requeued() == 1
    lost = cluster.at()
    process = cluster.start(*words)
    until(lambda: cluster.at() > lost, process)
    process.send_signal(signal.SIGTERM)  # scancel: it saves, and is not queued again
    ended(process)
    assert cluster.at() > lost
    assert cluster.times_requeued() == 1
    ended(cluster.start(*words))
    assert cluster.at() == 1600
    assert [line[1] for line in trace(cluster.run)] == list(range(16, 1601, 16))


def test_what_can_never_work_is_not_queued_again(cluster, scenes):
    process = cluster.start(*begun(cluster, scenes), "--set", "optim.lr=-1")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "optim.lr" in said
    assert "not queued again" in said
    assert cluster.times_requeued() == 0
    process = cluster.start("run")
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "say which run" in said


def test_the_batch_script_is_clean():
    assert subprocess.run(["bash", "-n", SBATCH]).returncode == 0
    if checker := shutil.which("shellcheck"):
        done = subprocess.run([checker, SBATCH], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def instructions() -> list[list[str]]:
    """Of the container file: instruction and arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", CONTAINER.read_text())
    return [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_container_copies_what_is_there_and_installs_as_the_makefile_does():
    for name, rest in instructions():
        if name == "COPY":
            for path in rest.split()[:-1]:
                assert (ROOT / path).exists(), path
    install = next(shlex.split(rest) for name, rest in instructions() if rest.startswith("pip install"))
    make = next(shlex.split(line.split("pip ", 1)[1]) for line in (ROOT / "Makefile").read_text().splitlines()
                if "--constraint" in line)
    assert [word for word in install[1:] if word != "--no-cache-dir"][:-1] == make[:-1]
    extras = re.findall(r"\w+", install[-1])
    declared = (ROOT / "pyproject.toml").read_text()
    assert extras
    assert all(f"\n{extra} = [" in declared for extra in extras)
    assert not [line for line in instructions() if line[0] not in ("FROM", "RUN", "WORKDIR", "COPY", "CMD")]


def test_the_page_shows_commands_that_exist():
    page = (ROOT / "docs/launch.md").read_text()
    for path in re.findall(r"tools/launch/[\w.]+", page):
        assert (ROOT / path).is_file(), path
    torch = subprocess.run([PROGRAM.parent / "torchrun", "--help"], capture_output=True, text=True).stdout
    for line in re.findall(r"^    torchrun .*(?:\\\n.*)*", page, re.M):
        for option in re.findall(r"--([\w-]+)", line.partition("uniclip-train")[0]):
            assert f"--{option}" in torch, option

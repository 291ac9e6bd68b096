"""kill -9 at random moments, also inside a checkpoint write, on any number of processes: as if never stopped."""

import os
import random
import subprocess
from pathlib import Path

import pytest
from short_runs import PROGRAM, begin, kill, launch, losses, on_ranks, overrides, run_until, steps, trace, weights

from trainer import checkpoint

OFTEN = {"run.save_every_samples": 32, "run.keep": 2}


def drill(scenes: Path, folder: Path, world: int, kills: int, stride: int) -> int:
    """Kill a run again and again → how often that tore a checkpoint. The trace and the weights equal the undisturbed run's."""
    chance, more, torn = random.Random(world), OFTEN | {"optim.samples": 16 * stride * (kills + 1)}, 0
    whole, killed = folder / "whole", folder / "killed"
    first = ["run", "scenes-tiny", *(w for o in overrides(scenes, killed, **more) for w in ("--set", o))]
    if world == 1:
        begin(scenes, whole, **more)
    else:
        on_ranks(world, [word.replace(str(killed), str(whole)) for word in first])
    for turn in range(kills):
        words = ["resume", str(killed)] if (killed / "checkpoints" / checkpoint.LATEST).is_file() else first
        at = stride * turn + chance.randrange(1, stride)
        run_until(launch(world, words), killed, at, chance.uniform(0, 0.03))
        checkpoint.read_state(checkpoint.find(killed))  # no moment without a loadable one
        torn += any(not (path / checkpoint.STATE).is_file() for path in (killed / "checkpoints").iterdir() if path.is_dir())
    assert launch(world, ["resume", str(killed)]).wait() == 0
    assert trace(killed) == trace(whole)
    assert weights(killed) == weights(whole)
    return torn


def test_kill_9_at_four_random_moments(scenes, tmp_path):
    drill(scenes, tmp_path, 1, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_kill_9_at_twenty_random_moments(scenes, tmp_path, capsys, world):
    torn = drill(scenes, tmp_path, world, 20, 12)
    with capsys.disabled():
        print(f"\n20 kills on {world} ranks, {torn} inside a checkpoint write: metrics and weights bit-equal")
    assert torn >= 2


@pytest.mark.slow
def test_two_one_four_three_ranks(scenes, tmp_path, capsys):
    """Killed and resumed on another number of processes each time: the next 20 losses are the undisturbed ones."""
    more = {"optim.samples": 16 * 100}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = ["run", "scenes-tiny", *(w for o in overrides(scenes, killed, **more) for w in ("--set", o))]
    on_ranks(2, [word.replace(str(killed), str(whole)) for word in words])
    worst = 0.0
    for turn, world in enumerate((2, 1, 4, 3)):
        at = steps(killed) and checkpoint.read_state(checkpoint.find(killed)).step
        run_until(launch(world, words), killed, 22 * (turn + 1) + 1)
        pairs = list(zip(losses(killed), losses(whole), strict=False))[at:at + 20]
        assert len(pairs) == 20
        worst = max(worst, *(abs(a - b) / b for a, b in pairs))
        words = ["resume", str(killed)]
    with capsys.disabled():
        print(f"\nlosses on 2 → 1 → 4 → 3 ranks differ by at most {worst:.1e}, relative")
    assert worst < 1e-5


@pytest.mark.slow
def test_two_agents_train_and_resume(scenes, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin(scenes, whole)
    words = ["run", "scenes-tiny", *(w for o in overrides(scenes, killed) for w in ("--set", o))]
    port = 20_000 + os.getpid() % 20_000
    for turn in range(2):
        agents = [subprocess.Popen([PROGRAM.parent / "torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
                                    "c10d", "--rdzv-endpoint", f"127.0.0.1:{port + turn}", "--no-python", PROGRAM, *words],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
        if turn == 0:
            run_until(agents[0], killed, 14)
            kill(agents[1])
        else:
            assert [agent.wait() for agent in agents] == [0, 0], [agent.communicate()[1].decode() for agent in agents]
        words = ["resume", str(killed)]
    assert len(losses(killed)) == 30
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-4)

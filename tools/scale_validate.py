"""tools.scale against this CPU: constants measured on one process and on two, steps of 1, 2 and 4 predicted and measured.

Processes of one thread share the cores, gloo stands in for NCCL. Everything is measured in turn, round after round, and
medians are taken: other work on the machine slows all alike. Beside the time on the wall, which ranks and other work share,
stands the processor time of a process, which they hardly touch.
"""

import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median

import torch
import torch.distributed as dist
from torch import nn

from pipeline.console import WorkFailed
from pipeline.schema import VECTOR_SIZE
from tools.scale_machine import Machine
from tools.scale_model import Prediction, Work, predict, resized
from trainer.accumulation import chunks, forward_backward
from trainer.config import Config
from trainer.config_file import load_config
from trainer.distributed import Ranks
from trainer.model import UniCLIP
from trainer.optim import make_optimizer
from trainer.parallel import Step, parallel
from trainer.tiles import tiled_loss

WORLDS, BATCH, CALIBRATING = (1, 2, 4), 128, (16, 64)
LOSS_BATCH, MATMUL, MATMULS, SMALL = 512, 1024, 8, 4  # groups; rows and columns, how many; bytes


def _barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


class _Rank:
    """What a process can be asked for."""

    def __init__(self, config: Config, rank: int, world: int):
        torch.manual_seed(0)
        self.config, self.rank, self.world = config, rank, world
        self.model = UniCLIP(config.model, config.model.text.vocab_size, 2, config.learns_offset)
        self.step_of = parallel(Step(self.model), Ranks(rank, world, BATCH), "cpu")
        self.optimizer = make_optimizer(self.model, config.optim)
        self.weights = sum(p.numel() for p in self.model.parameters())

    def step(self, batch: int) -> None:
        """A training step on noise: this rank's share of `batch` groups."""
        ranks, views, size = Ranks(self.rank, self.world, batch), len(self.config.data.kinds()), self.config.model.image.size
        groups = (self.rank + 1) * batch // self.world - self.rank * batch // self.world
        image_V = [torch.randn(groups, 3, size, size) for _ in range(views)]
        token_BTL = torch.randint(2, 99, (groups, 1, self.config.model.text.context))
        self.optimizer.zero_grad(set_to_none=True)
        forward_backward(self.step_of, chunks(1, image_V, torch.rand(groups, views, VECTOR_SIZE), token_BTL),
                         partial(tiled_loss, "mp_nce", ranks=ranks), ranks)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def loss(self, batch: int) -> None:
        """Forward and backward of the loss alone."""
        views, dim = len(self.config.data.kinds()), self.config.model.dim
        image_BVD, text_BTD = (torch.randn(batch, count, dim, requires_grad=True) for count in (views, 1))
        tiled_loss("mp_nce", image_BVD, text_BTD, torch.full((3,), 0.07), torch.zeros(3)).backward()

    def reduce(self, size: int) -> None:
        """A sum over ranks."""
        dist.all_reduce(torch.zeros(size // 4))

    def matmul(self, size: int) -> None:
        """Products of two square matrices."""
        a, b = torch.zeros(size, size), torch.zeros(size, size)
        for _ in range(MATMULS):
            torch.mm(a, b)


def _serve(config: Config, rank: int, world: int, store: str, orders: Connection) -> None:
    """A process: does what it is told and says how long it took, until it is told nothing more."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    one = _Rank(config, rank, world)
    while (order := orders.recv()) is not None:
        name, argument = order
        _barrier(world)
        begun, worked = time.perf_counter(), time.process_time()
        getattr(one, name)(argument)
        _barrier(world)
        orders.send((time.perf_counter() - begun, time.process_time() - worked))
    if world > 1:
        dist.destroy_process_group()


class World:
    """Processes that wait for work, asleep."""

    def __init__(self, config: Config, size: int, folder: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tools.scale_validate"])
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [context.Process(target=_serve, args=(config, rank, size, str(folder / f"store{size}"), theirs))
                           for rank, (_, theirs) in enumerate(pipes)]
        for process in self._processes:
            process.start()

    def seconds(self, name: str, argument: int) -> tuple[float, float]:
        """On the wall, of the slowest; of a processor, on average. Raises WorkFailed when one of them is gone."""
        try:
            for pipe in self._pipes:
                pipe.send((name, argument))
            walls, works = zip(*(pipe.recv() for pipe in self._pipes), strict=True)
        except (EOFError, OSError):
            raise WorkFailed(f"one of {len(self._pipes)} processes ended while it measured {name} of {argument}, as one does "
                             "that is killed for want of memory: see what it said above, and try again") from None
        return max(walls), mean(works)

    def close(self) -> None:
        """End them."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with suppress(OSError):  # it is gone
                pipe.send(None)
            process.join(20)
            process.kill()


def medians(config: Config, rounds: int, batch: int = BATCH) -> list[dict[str, float]]:
    """Seconds on the wall and of a processor of everything that is measured, in turn, after a first round."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # DDP's word on parameters that it need not look for
    size = 4 * sum(p.numel() for p in UniCLIP(config.model, config.model.text.vocab_size, 2, config.learns_offset).parameters())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        worlds = {count: World(config, count, Path(folder)) for count in WORLDS}
        for world in worlds.values():
            stack.callback(world.close)
        asked: dict[str, Callable[[], tuple[float, float]]] = {
            "loss": partial(worlds[1].seconds, "loss", LOSS_BATCH),
            "small": partial(worlds[2].seconds, "reduce", SMALL), "large": partial(worlds[2].seconds, "reduce", size)}
        asked |= {f"batch {n}": partial(worlds[1].seconds, "step", n) for n in CALIBRATING}
        asked |= {f"matmul {n}": partial(worlds[n].seconds, "matmul", MATMUL) for n in (1, 4)}
        asked |= {f"ranks {n}": partial(worlds[n].seconds, "step", batch) for n in WORLDS}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
        for _ in range(rounds + 1):
            for name, work in asked.items():
                times[name].append(work())
    return [{name: median(value[n] for value in values[1:]) for name, values in times.items()} for n in (0, 1)]


def machine_of(work: Work, seconds: dict[str, float], crowded: bool) -> Machine:
    """Constants from one process at two small batches, from a sum over two, and from matmuls in one and in four at once.

    Where ranks are crowded the last say how many cores there are: other work on the machine takes its part of them.
    """
    low, high = CALIBRATING
    loss = 4 * (work.members * LOSS_BATCH) ** 2 * work.dim / seconds["loss"]
    small, large = (seconds[f"batch {n}"] - 4 * (work.members * n) ** 2 * work.dim / loss for n in CALIBRATING)
    sample = (large - small) / (high - low)
    cores = min(max(4 * seconds["matmul 1"] / seconds["matmul 4"], 1), len(os.sched_getaffinity(0)))
    two, nothing = max(1.0, 2 / cores) if crowded else 1.0, 1e-12
    return Machine(towers=work.tower_flops / sample, loss=loss, host=max(small - low * sample, nothing), launch=nothing,
                   nvlink=two * 4 * work.trainable / max(seconds["large"] - seconds["small"], nothing),
                   nvlink_hop=seconds["small"] / 2 / two, overlap=0, cores=cores if crowded else 0,
                   memory_bandwidth=1 / nothing, decode=1 / nothing, storage=1 / nothing)


@dataclass(frozen=True)
class Compared:
    """Constants and medians, and a prediction for each of WORLDS."""

    machine: Machine
    seconds: dict[str, float]
    predictions: list[Prediction]

    def ratio(self, one: Prediction) -> float:
        """Measured / predicted."""
        return self.seconds[f"ranks {one.ranks}"] / one.step


def validate(rounds: int = 15, batch: int = BATCH) -> list[Compared]:
    """On the wall, and of a processor."""
    config = load_config("scenes-tiny", ["run.device=cpu", "model.text.vocabulary=train"])
    work, found = Work(resized(config, batch)), []
    for seconds, crowded in zip(medians(config, rounds, batch), (True, False), strict=True):
        machine = machine_of(work, seconds, crowded)
        found.append(Compared(machine, seconds, [predict(work, machine, ranks, batch) for ranks in WORLDS]))
    return found


def report(rounds: int = 15, batch: int = BATCH) -> str:
    """A table."""
    load = os.getloadavg()[0]
    wall, processor = validate(rounds, batch)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line).partition(":")[2]
    lines = [f"scenes-tiny, batch {batch}, fp32, gloo, processes of one thread on {os.cpu_count()} cores of {model.strip()}, "
             f"{wall.machine.cores:.1f} of them free, load {load:.1f}, commit {commit}; medians of {rounds} turns", ""]
    for name, of in (("wall", wall), ("processor", processor)):
        rate = 2 * MATMULS * MATMUL**3 / of.seconds["matmul 1"]
        lines.append(f"{name}: matmul {rate / 1e9:.0f} GFLOP/s; towers {of.machine.towers / 1e9:.0f}, loss "
                     f"{of.machine.loss / 1e9:.0f}; all-reduce {of.machine.nvlink / 1e9:.1f} GB/s, "
                     f"{1e6 * of.machine.nvlink_hop:.0f} µs a hop; {1e3 * of.machine.host:.0f} ms of every step  ")
    lines += ["", "| processes | wall ms, predicted | measured | ratio | processor ms of each, predicted | measured | ratio |",
              "|---:|---:|---:|---:|---:|---:|---:|"]
    for pair in zip(wall.predictions, processor.predictions, strict=True):
        cells = [f"{1e3 * one.step:.0f} | {1e3 * of.seconds[f'ranks {one.ranks}']:.0f} | {of.ratio(one):.2f}"
                 for of, one in zip((wall, processor), pair, strict=True)]
        lines.append(f"| {pair[0].ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)

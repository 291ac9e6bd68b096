"""Worlds of real processes: each is started once and runs what it is given on every rank."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "trainer.tiles", "pipeline.console", "pytest"])


def share(rank: int, world: int, batch: int) -> slice:
    return slice(rank * batch // world, (rank + 1) * batch // world)


class World:
    """W processes of one gloo group that run the functions they are given, side by side."""

    def __init__(self, size: int, rendezvous: Path):
        self.size = size
        self._pipes = []
        for rank in range(size):
            here, there = FORKSERVER.Pipe()
            FORKSERVER.Process(target=_serve, args=(rank, size, rendezvous, there), daemon=True).start()
            self._pipes.append(here)

    def start(self, work: Callable, *arguments) -> None:
        """Have every rank work; `results` waits for it."""
        for pipe in self._pipes:
            pipe.send((work, arguments))

    def run(self, work: Callable, *arguments) -> list:
        """work(rank, world, *arguments) of every rank; raises the first exception of any."""
        self.start(work, *arguments)
        return self.results()

    def results(self) -> list:
        """What each rank's work returned."""
        results = [pipe.recv() for pipe in self._pipes]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)


def _serve(rank: int, world: int, rendezvous: Path, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    while (order := pipe.recv()) is not None:
        work, arguments = order
        try:
            pipe.send(work(rank, world, *arguments))
        except Exception as error:
            pipe.send(error)
    dist.destroy_process_group()

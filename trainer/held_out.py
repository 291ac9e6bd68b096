"""The loss of samples that are not trained on: the run's objective over an index, the same views at every evaluation."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from pipeline.console import InputError, say
from pipeline.index import Index
from pipeline.ledger import Ledger
from pipeline.loader import Indexed, slice_of
from pipeline.plan import Plan, rows_of
from pipeline.reader import Place
from pipeline.recipe import Cursor
from pipeline.schema import Batch
from trainer.accumulation import chunks
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.objectives import Objective
from trainer.parallel import Step
from trainer.training import Training


class HeldOut:
    """An index whose every sample is seen once, in batches as in training, always under the same views and captions."""

    def __init__(self, config: Config, t: Training, folder: Path):
        index = Index.open(folder)
        if not len(index):
            raise InputError(f"eval.held_out: {folder} has no samples: give another index")
        place = Place(timeout=config.data.read_timeout)
        place.check(index.folder, index.manifest["shards"])
        self._config, self._t = config, t
        self._data = Indexed(index, Plan.whole(index.shard_starts), place, {})
        if t.ranks.rank == 0 and isinstance(t.data, Indexed) and (both := _shared(index, t.data)):
            say(f"warning: {both:,} of {len(index):,} held-out samples are trained on too: the held-out loss flatters")

    def loss(self, obey: Callable[[], None]) -> float:
        """Mean over samples of the loss of their global batch; the last batch is what is left, so its loss has less chance."""
        whole = self._config.optim.batch_size
        full, rest = divmod(len(self._data.index), whole)
        total, samples = 0.0, 0
        for size, position, count in ((whole, 0, full), (rest, full * whole, min(rest, 1))):
            of = replace(self._t.ranks, batch=size)
            with closing(self._batches(size, position, of)) as batches:
                for batch in islice(batches, count):
                    obey()
                    valid, = of.sum(int(batch.valid.sum()))
                    if valid:
                        total, samples = total + valid * self._loss(batch, of), samples + valid
        return total / samples if samples else float("nan")

    def _batches(self, size: int, position: int, of: Ranks) -> Generator[Batch]:
        """This rank's slices of batches of `size`, without end; one bad sample where it has none of so small a batch."""
        t, mine = self._t, slice_of(of.rank, of.world, size)
        idle = mine.start == mine.stop
        share = (1, t.device, 0, 1) if idle else (size, t.device, of.rank, of.world)
        cursor = Cursor(0, position, self._data.fingerprint, "")
        with closing(iter(self._data.loader(t.tokenizer, t.recipe, cursor, *share, Ledger(None, 1.0)))) as stream:
            for batch, _ in stream:
                yield replace(batch, valid=torch.zeros_like(batch.valid)) if idle else batch

    def _loss(self, batch: Batch, of: Ranks) -> float:
        """The objective, in as many parts as in training, but on each rank the same number."""
        step = Step(self._t.model, self._config.run.precision == "bf16")
        count = min(self._config.optim.accumulation, of.batch // of.world)
        outputs = [step(*part) for part in chunks(count, batch.views, batch.vectors, batch.tokens)]
        *of_groups, temperatures, offsets = zip(*outputs, strict=True)
        objective = Objective(self._config, of, self._t.model.auxiliary)
        return objective(batch, *map(torch.cat, of_groups), temperatures[0], offsets[0]).item()


def _shared(held_out: Index, trained: Indexed) -> int:
    """How many samples of an index a run trains on: neither its skip lists nor its weights leave them out."""
    ids = np.sort(held_out.columns(np.arange(len(held_out)))["sample_id"])
    rows = np.setdiff1d(rows_of(trained.index, ids), trained.plan.skipped)
    return int((trained.plan.weight_C[trained.plan.source_of(rows)] > 0).sum())

"""Evaluation during training, on all ranks with exact counts: held-out loss, retrieval, zero-shot classification.

A set is cut into batches of one fixed size, and of W ranks each embeds every W-th batch: on any number of ranks the numbers
are the same to the bit, and those of `uniclip-eval`. N images, T texts, K batches of each rank, L tokens, D embedding.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, compress, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.console import InputError, say
from pipeline.evalsets import RETRIEVAL, EvalSet, Example, Target, open_evalset, rendered, require_prompts
from pipeline.images import Undecodable
from pipeline.replay import eval_view
from pipeline.seals import read_lines
from trainer.batches import batched, filled, text_batches
from trainer.config import Config, EvalConfig
from trainer.distributed import Ranks
from trainer.held_out import HeldOut
from trainer.log import METRICS, Log
from trainer.metrics import ensembled, ranks, recall_at, retrieval_recalls
from trainer.orders import Orders
from trainer.parallel import evaluating
from trainer.training import Training

PREFIX = "eval/"


class Interrupted(Exception):
    """An order to stop came while evaluating."""


class Validation:
    """What [eval] asks for. Everything is opened and checked at once. Raises InputError."""

    def __init__(self, config: Config, t: Training, orders: Orders):
        self._config, self._t, self._orders = config, t, orders
        wanted = config.eval if config.eval.every_samples else EvalConfig()
        self._held_out = HeldOut(config, t, wanted.held_out) if wanted.held_out else None
        self.sets = tuple(Examined.open(folder, config.eval, t) for folder in wanted.sets)
        names = [one.evalset.name for one in self.sets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"eval.sets has two folders named {min(twice)}, the log could not tell them apart: rename one")

    def evaluate(self, log: Log | None) -> bool:
        """Evaluate and log where it is due and not done yet → whether an order to stop came in between. All ranks call it."""
        t, samples = self._t, self._t.cursor.samples_seen
        if not self._due(samples) or t.ranks.any(log is not None and _logged(self._config.run.folder, samples))[0]:
            return False
        begin, numbers = time.perf_counter(), {}
        try:
            with t.average.in_place() if t.average else nullcontext(), evaluating(t.model):
                if self._held_out:
                    numbers["held_out_loss"] = self._held_out.loss(self._obey)
                for one in self.sets:
                    found = self._measured(one)
                    numbers |= {f"{one.evalset.name}/{name}": value for name, value in found.items()}
        except Interrupted:
            return True
        if log:
            numbers["seconds"] = time.perf_counter() - begin
            log.evaluated({"samples": samples, **{f"{PREFIX}{name}": value for name, value in numbers.items()}})
        return False

    def _due(self, samples: int) -> bool:
        """Whether the last step led past a multiple of `every_samples`, or to the end."""
        every, optim = self._config.eval.every_samples, self._config.optim
        return bool(every and samples) and (samples // every > (samples - optim.batch_size) // every
                                            or samples >= optim.samples)

    def _obey(self) -> None:
        """Raise Interrupted, on all ranks together. A collective."""
        if self._t.ranks.any(self._orders.stop)[0]:
            raise Interrupted

    def _measured(self, one: "Examined") -> dict[str, float]:
        """The metrics, on rank 0; none, and a line that says why, where the set has become unreadable."""
        t, faults = self._t, []
        size = self._config.eval.batch_size
        with ThreadPoolExecutor(t.recipe.threads or os.cpu_count()) as pool:
            batches = one.pixels(size, t.recipe.size, t.ranks, pool)
            blank_CHW = np.zeros((1, 3, t.recipe.size, t.recipe.size), np.float32)
            count = -(-len(one.targets) // size)
            image_ND = self._embedded(t.model.encode_image, batches, count, size, blank_CHW, faults).flatten(0, 1)
        texts = text_batches(one.token_TL, 0, 4 * size)
        own = (one.token_TL[rows, :length] for rows, length in texts[t.ranks.rank::t.ranks.world])
        text_KBD = self._embedded(t.model.encode_text, own, len(texts), 4 * size, one.token_TL[:1], faults)
        for fault in faults[:1]:
            say(f"no numbers of {one.evalset.name} this time: {fault}")
        if t.ranks.any(bool(faults))[0] or t.ranks.rank:
            return {}
        text_TD = text_KBD.new_empty(len(one.token_TL), text_KBD.shape[-1])
        for (rows, _), z_BD in zip(texts, text_KBD, strict=True):
            text_TD[rows] = z_BD[:len(rows)]
        return one.metrics(image_ND[:len(one.targets)], text_TD)

    def _embedded(self, encode: Callable[[Tensor], Tensor], own: Iterator[np.ndarray], count: int, size: int,
                  blank_BX: np.ndarray, faults: list[str]) -> Tensor:
        """(count, size, D) on the CPU: all batches, of which `own` yields this rank's.

        All ranks encode as often, blanks in the end: sharded weights are put together by all.
        """
        t, found = self._t, []
        rounds = -(-count // t.ranks.world)
        for k in range(rounds):
            self._obey()
            items_BX = blank_BX
            if k * t.ranks.world + t.ranks.rank < count and not faults:
                try:
                    items_BX = next(own)
                except (InputError, Undecodable, OSError, StopIteration) as error:
                    faults.append(str(error) or "it has fewer examples than at the start")
            found.append(encode(torch.from_numpy(filled(items_BX, size)).to(t.device)).float())
        z_KBD = torch.stack(found)
        if t.ranks.world > 1:
            every = replace(t.ranks, batch=rounds * t.ranks.world).gather(z_KBD)
            z_KBD = every.unflatten(0, (t.ranks.world, rounds)).transpose(0, 1).flatten(0, 1)
        return z_KBD[:count].cpu()


def _logged(folder: Path, samples: int) -> bool:
    """Whether metrics.jsonl holds an evaluation at `samples`."""
    lines = read_lines(folder / METRICS, "remove the line")
    return any(line.get("samples") == samples and any(name.startswith(PREFIX) for name in line) for line in lines)


@dataclass(frozen=True)
class Examined:
    """A set: which of its examples are used, their labels or captions, and the tokens of its captions or prompts."""

    evalset: EvalSet
    used_N: np.ndarray
    targets: list[Target]
    token_TL: np.ndarray

    @classmethod
    def open(cls, folder: Path, config: EvalConfig, t: Training) -> "Examined":
        """Raises InputError."""
        evalset = open_evalset(folder, config.split)
        if evalset.kind != RETRIEVAL:
            require_prompts(evalset, folder, evalset.templates)
        every = [target for _, _, target in evalset.examples()]
        if not every:
            raise InputError(f"evaluation set {folder} has no examples in its split {config.split!r}: fetch it again")
        used_N = np.diff(np.arange(len(every) + 1) * min(config.samples or len(every), len(every)) // len(every)) > 0
        targets = list(compress(every, used_N))
        texts = (list(chain.from_iterable(targets)) if evalset.kind == RETRIEVAL  # type: ignore[arg-type]
                 else rendered(evalset.classnames, evalset.templates))
        return cls(evalset, used_N, targets, t.tokenizer(texts))

    def pixels(self, size: int, image_size: int, of: Ranks, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """Yield this rank's batches. Raises InputError and Undecodable."""
        def view(example: Example) -> np.ndarray:
            try:
                return eval_view(example[1], image_size)
            except Undecodable as error:
                raise Undecodable(f"image {example[0]} cannot be decoded ({error})") from None

        batches = batched(compress(self.evalset.examples(), self.used_N), size)
        for batch in islice(batches, of.rank, None, of.world):
            yield np.stack(list(pool.map(view, batch)))

    def metrics(self, image_ND: Tensor, text_TD: Tensor) -> dict[str, float]:
        """Recall@K both ways, or accuracy and accuracy@5, under the names that `uniclip-eval` gives them."""
        if self.evalset.kind == RETRIEVAL:
            texts_N = [len(captions) for captions in self.targets]  # type: ignore[arg-type]
            return retrieval_recalls(image_ND, text_TD, torch.arange(len(texts_N)).repeat_interleave(torch.tensor(texts_N)))
        classes = len(self.evalset.classnames)
        rank_N = ranks(image_ND, ensembled(text_TD, classes), np.array(self.targets), np.arange(classes))
        return {name: recall_at(rank_N, k) for name, k in (("accuracy", 1), ("accuracy@5", 5)) if k == 1 or classes > k}

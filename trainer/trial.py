"""A run's first moments, for `check`: how fast it reads, how fast it trains, whether it learns one batch by heart."""

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pipeline.ledger import Ledger
from pipeline.progress import clock
from pipeline.schema import Batch
from trainer.config import Config, OptimConfig
from trainer.distributed import ALONE
from trainer.objectives import Objective
from trainer.optim import set_rate
from trainer.step import clipped, global_loss, update
from trainer.training import Training, start
from trainer.verdict import Verdict, judged

SECONDS = 2.0  # of measuring each rate
GROUPS, PARTS = {"cpu": 32, "cuda": 256}, 2  # of a measured batch, at most
LEARNT_GROUPS, STEPS, WARM_UP, LONGEST = 16, 60, 10, 90.0  # of the batch learnt by heart; LONGEST in seconds
FIRST_STEPS = 3  # in which every parameter must get a gradient


@dataclass(frozen=True)
class Pace:
    """Samples read, bad ones by reason; samples/s of one process that only reads, and of one that only trains."""

    seen: int
    bad: int
    reasons: Counter
    read: float
    trained: float


@dataclass
class Fit:
    """What came of one batch. Names of parameters: without gradient, with one that is not finite, that did not move.

    learnt: how far the loss came from chance to floor. late: time was up before all steps were made.
    """

    groups: int
    parameters: int
    steps: int = 0
    first: float = math.nan
    last: float = math.nan
    learnt: float = 0.0
    late: bool = False
    without: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    still: list[str] = field(default_factory=list)


def pace(config: Config, t: Training, ranks: int, scratch: Path) -> tuple[Pace, Batch | None]:
    """Reads and trains for a few seconds; the first batch, None where it holds less than two different groups."""
    part = max(config.optim.batch_size // ranks // config.optim.accumulation, 2)
    groups = min(part * min(config.optim.accumulation, PARTS), GROUPS[torch.device(t.device).type])
    ledger = Ledger(scratch / "bad_samples.jsonl", budget=1.0)
    read, batch = _read(t, groups, ledger)
    lines = (scratch / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines() if ledger.bad else []
    reasons = Counter(line["reason"] for line in map(json.loads, lines) if line.get("sample", True))
    usable = len(_different(batch)) > 1
    trained = _train(config, t, batch) if usable else math.nan
    return Pace(ledger.seen, ledger.bad, reasons, read, trained), batch if usable else None


def _read(t: Training, groups: int, ledger: Ledger) -> tuple[float, Batch]:
    """Samples/s after the first batch, and that batch."""
    stream = iter(t.data.loader(t.tokenizer, t.recipe, t.cursor, groups, t.device, ledger=ledger))
    try:
        batch, _ = next(stream)
        began, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < SECONDS:
            next(stream)
            count += groups
        return count / elapsed, batch
    finally:
        stream.close()


def _train(config: Config, t: Training, batch: Batch) -> float:
    """Samples/s of steps that leave the weights where they are, after the first."""
    set_rate(t.optimizer, 0.0)
    objective = Objective(_of_size(config, len(batch.valid)), ALONE, t.model.auxiliary)
    began, count = time.perf_counter(), -1
    while count < 2 or time.perf_counter() - began < SECONDS:
        _step(config, t, batch, objective)
        if t.device.startswith("cuda"):
            torch.cuda.synchronize()
        count += 1
        began = time.perf_counter() if count == 0 else began
    rate = count * len(batch.valid) / (time.perf_counter() - began)
    t.optimizer.state.clear()
    return rate


def _step(config: Config, t: Training, batch: Batch, objective: Objective) -> tuple[float, float]:
    """→ loss, norm of the gradient."""
    optim = config.optim.model_copy(update={"accumulation": min(config.optim.accumulation, PARTS)})
    loss, _ = global_loss(optim, t, objective, batch)
    norm = clipped(optim, t)
    if torch.isfinite(loss + norm):
        update(optim, t, objective, batch)
    return loss.item(), norm.item()


def _of_size(config: Config, groups: int) -> Config:
    """The same with batches of `groups`, for what chance and floor are."""
    return config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": groups})})


def _different(batch: Batch) -> list[int]:
    """Places of valid groups, one for each id."""
    ids, valid = batch.group_id.tolist(), batch.valid.tolist()
    return sorted({group: b for b, group in enumerate(ids) if valid[b]}.values())


def fit_one_batch(config: Config, t: Training, batch: Batch) -> Fit:
    """Learn a few groups by heart, at the run's own rate after a short warm-up."""
    rows = _different(batch)[:LEARNT_GROUPS]
    batch = replace(batch, views=[view[rows] for view in batch.views], **{
        name: getattr(batch, name)[rows] for name in ("vectors", "tokens", "sample_id", "group_id", "valid")})
    objective = Objective(_of_size(config, len(rows)), ALONE, t.model.auxiliary)
    learning = {name: p for name, p in t.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learning.items()}
    fit, began, without = Fit(len(rows), len(learning)), time.perf_counter(), set(learning)
    while fit.steps < STEPS and fit.learnt < 0.9 and not fit.late:
        set_rate(t.optimizer, config.optim.lr * min(1.0, (fit.steps + 1) / WARM_UP))
        fit.last, norm = _step(config, t, batch, objective)
        if not math.isfinite(fit.last + norm):
            fit.broken = [name for name, p in learning.items() if p.grad is not None and not p.grad.isfinite().all()]
            break
        if fit.steps < FIRST_STEPS:
            without -= {name for name, p in learning.items() if p.grad is not None and p.grad.any()}
        numbers = objective.numbers(batch)
        chance, floor = float(numbers["chance_loss"]), float(numbers["floor_loss"])  # type: ignore[arg-type]
        fit.first = fit.last if fit.steps == 0 else fit.first
        fit.learnt = (chance - fit.last) / (chance - floor)
        fit.steps, fit.late = fit.steps + 1, time.perf_counter() - began > LONGEST
    fit.without = sorted(without) if fit.steps >= FIRST_STEPS else []
    fit.still = [name for name, p in learning.items() if torch.equal(p, before[name])] if fit.steps else []
    return fit


def trial(config: Config, ranks: int) -> Iterator[Verdict]:
    """Start the run without its folder, read what it reads, train for a moment. Raises what a run raises."""
    with tempfile.TemporaryDirectory() as folder:
        run = config.run.model_copy(update={"folder": Path(folder, "run"), "mirror": ""})
        training = start(config.model_copy(update={"run": run}))
        yield from (Verdict("init", note) for note in training.notes)
        found, batch = pace(config, training, ranks, Path(folder))
        yield _images(found, config.data.bad_sample_budget)
        if batch is None:
            yield Verdict("one batch", "its groups are bad or all of one id", "bad", "see decoding and twins")
        else:
            fit = fit_one_batch(config, training, batch)
            yield _gradients(fit)
            yield _fit(fit)
            yield _rates(config.optim, found, ranks)


def _images(found: Pace, budget: float) -> Verdict:
    share = found.bad / max(found.seen, 1)
    return judged("decoding", f"{found.bad:,} of {found.seen:,} samples are bad"
                  + "".join(f", {count} × {reason}" for reason, count in found.reasons.most_common(2)),
                  (found.bad == found.seen, "bad", "nothing can be decoded: see data.shards and data.read_timeout"),
                  (share > budget, "bad", f"the run would stop at {budget:.1%} (data.bad_sample_budget): index the set again"),
                  (share > 0, "warn", "each costs its place in a batch"))


def _gradients(fit: Fit) -> Verdict:
    return judged("gradients", f"of {fit.parameters} tensors: {len(fit.without)} without one, {len(fit.broken)} not finite, "
                  f"{len(fit.still)} that do not move",
                  (bool(fit.broken), "bad", f"not finite: {_some(fit.broken)}: lower optim.lr, or look at [init]"),
                  (bool(fit.without), "bad", f"nothing reaches {_some(fit.without)}: freeze it, or check [model] and [init]"),
                  (len(fit.still) == fit.parameters, "bad", "nothing is trained: check optim.lr and optim.lr_scale"),
                  (bool(fit.still), "warn", f"{_some(fit.still)}: optim.lr_scale or optim.lr leaves them as they are"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fit(fit: Fit) -> Verdict:
    return judged("one batch", f"of {fit.groups} groups, {fit.steps} steps: loss {fit.first:.3f} → {fit.last:.3f}, "
                  f"{max(fit.learnt, 0):.0%} of the way from chance to floor",
                  (bool(fit.broken) or math.isnan(fit.last), "bad", "loss or gradient is not finite: lower optim.lr"),
                  (fit.learnt < 0.5 and fit.late, "warn", "time was up before it could learn: check on a faster device"),
                  (fit.learnt < 0.5, "bad", "it does not learn even one batch: lower optim.lr, or check [init] and lr_scale"),
                  (fit.learnt < 0.8, "warn", "it learns slowly: another optim.lr may do better"))


def _rates(optim: OptimConfig, found: Pace, ranks: int) -> Verdict:
    """Each alone; on a CPU they share the cores."""
    binding, waits = min(found.read, found.trained), max(0.0, 1 - found.read / found.trained)
    cure = (f"training would wait {waits:.0%} of the time: see `uniclip-data bench`, raise data.threads, set data.cache, or "
            "use a faster disk")
    return judged("speed", f"data {found.read:,.0f} samples/s, steps {found.trained:,.0f}: {'data' if waits else 'steps'} bind"
                  f", about {clock(optim.samples / (binding * ranks))} for the run here",
                  (waits > 0.5, "bad", cure), (waits > 0.05, "warn", cure))

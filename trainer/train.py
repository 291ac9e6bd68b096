"""The training loop: next batch, forward, loss, backward, step, log, save, evaluate."""

import os
import resource
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.console import InputError, say
from pipeline.files import replacing
from pipeline.ledger import Ledger
from trainer import checkpoint
from trainer.config import Config
from trainer.config_file import changed
from trainer.distributed import Ranks, pick_device, process_group
from trainer.failures import Skips
from trainer.flops import flops_by_length, peak_flops
from trainer.lock import alone_in
from trainer.log import LEDGER, Log
from trainer.mirror import Mirror
from trainer.objectives import Objective
from trainer.optim import learning_rate, set_rate
from trainer.orders import Orders, Stopped
from trainer.saver import Saver
from trainer.step import clipped, global_loss, gradient_norms, update
from trainer.training import Training, restored, snapshot, start
from trainer.validation import Validation


def run(config: Config) -> Path:
    """Start a run, alone or as one of the processes that torchrun started → its last checkpoint. Raises InputError."""
    with (Orders() as orders, process_group(config.optim.batch_size, pick_device(config.run.device)) as (ranks, device),
          alone_in(config.run.folder, ranks)):
        return train(config, start(config, device, ranks), orders)


def resume(place: str, folder: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Go on with the run in a folder, on any number of processes → its last checkpoint.

    place may be the URL of a run's mirror, which is fetched into `folder`. overrides: what may change. Raises InputError.
    """
    mirror = Mirror(place) if "://" in place else None
    if folder and not mirror:
        raise InputError(f"--folder {folder} is where a mirror is fetched to, but {place} is no URL: leave it out")
    if mirror and not folder:  # a stranger's configuration must not choose where files are written
        raise InputError(f"resume {place} fetches the run: say where to with --folder DIR, its own folder or a new one")
    config = changed(mirror.config(), overrides) if mirror else checkpoint.load_config_of(Path(place), overrides)
    path = folder or Path(place)
    with (Orders() as orders, process_group(config.optim.batch_size, pick_device(config.run.device)) as (ranks, device),
          alone_in(folder or config.run.folder, ranks)):
        if mirror:
            _fetch(mirror, path, ranks)
        return train(*restored(path, device, ranks, overrides), orders)


def _fetch(mirror: Mirror, path: Path, ranks: Ranks) -> None:
    """One process on each machine fetches, however long that takes."""
    with ThreadPoolExecutor(1, "mirror") as fetcher:
        fetching = fetcher.submit(mirror.fetch, path) if os.environ.get("LOCAL_RANK", "0") == "0" else None
        ranks.until(lambda: fetching is None or fetching.done())
    with ranks.agreeing():
        if fetching:
            fetching.result()


def train(config: Config, t: Training, orders: Orders | None = None) -> Path:
    """Train from where `t` stands to `optim.samples`, or to an order to stop → the last checkpoint's folder. Rank 0 writes.

    Raises WorkFailed when too many losses or gradients are not finite, too many samples are bad, or a checkpoint cannot
    be written.
    """
    run, optim, ranks, orders = config.run, config.optim, t.ranks, orders or Orders()
    validation, saver = Validation(config, t, orders), Saver(run)
    log, ledger = _open(config, t, saver)
    loader = t.data.loader(t.tokenizer, t.recipe, t.cursor, optim.batch_size, t.device, ranks.rank, ranks.world, ledger)
    objective, skips = Objective(config, ranks, t.model.auxiliary), Skips(run.folder, optim.skips)
    stream, clock = iter(loader), Clock(config, t)
    try:
        with clock.paused():
            stop = validation.evaluate(log)  # what it was stopped in
        while t.cursor.samples_seen < optim.samples and not stop:
            try:
                with clock.waiting(), orders.waiting(alone=ranks.world == 1):
                    batch, after = next(stream)
            except Stopped:
                stop = True
                break
            before, done = t.cursor.samples_seen, after.samples_seen >= optim.samples
            logged = t.step == 0 or (t.step + 1) % run.log_every == 0 or done

            rate = learning_rate(optim, before)
            set_rate(t.optimizer, rate)
            loss, length = global_loss(optim, t, objective, batch)
            norms = gradient_norms(t.model) if logged else {}
            norm = clipped(optim, t)
            bad, stop, save = ranks.any(not torch.isfinite(loss + norm), orders.stop, orders.save() or clock.due())
            if bad:
                skips.skip(config, t, batch, loss, norm)
            else:
                update(optim, t, objective, batch)
            t.cursor, t.step = after, t.step + 1

            clock.worked(optim.batch_size, length)
            if log and logged and not bad:
                log.write({"step": t.step, "samples": after.samples_seen, "loss": loss.item(), "lr": rate,
                           "grad_norm": norm.item(), "grad_norms": norms, "skipped": t.skipped,
                           "bad_samples": ledger.bad, **objective.numbers(batch), **clock.lap(t)})
            if save or done or after.samples_seen // run.save_every_samples > before // run.save_every_samples:
                _save(config, t, saver, clock.total)
                clock.saved()
            if not stop:
                with clock.paused():
                    stop = validation.evaluate(log)
            saver.check()
        if stop:
            _save(config, t, saver, clock.total)
        _finish(t, saver)
    finally:
        stream.close()
        saver.close()
        if log:
            log.close()
    ranks.wait()
    saved = checkpoint.folder_of(run.folder, t.cursor)
    if log:
        say(f"checkpoint {saved}" + (f": stopped, go on with `uniclip-train resume {run.folder}`" if stop else ""))
    return saved


def _open(config: Config, t: Training, saver: Saver) -> tuple[Log | None, Ledger]:
    """Make the run's folder what it must be before the first step → the log of rank 0, the ledger."""
    folder, samples = config.run.folder, t.cursor.samples_seen
    saver.newest = samples or None
    if t.ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with (checkpoint.writing(folder / checkpoint.CONFIG, "make room, then give the same command again"),
              replacing(folder / checkpoint.CONFIG) as temporary):
            temporary.write_text(config.to_toml(), encoding="utf-8")
        if samples:
            say(f"resuming {folder} at {samples:,} samples")
            checkpoint.point_at(checkpoint.folder_of(folder, t.cursor))
        else:
            say("\n".join([_introduction(config, t), *t.notes]))
    if not samples:
        _save(config, t, saver, 0.0)
        _finish(t, saver)
    log = Log(config.run, config.optim.samples, samples) if t.ranks.rank == 0 else None
    t.ranks.wait()  # nobody reads or adds to the ledger before rank 0 has cut it back
    return log, Ledger.resumed(folder / LEDGER, config.data.bad_sample_budget, samples, t.ranks.sum)


def _save(config: Config, t: Training, saver: Saver, seconds: float) -> None:
    """All ranks give what they hold, rank 0 writes; nothing where there already is a checkpoint."""
    if saver.newest == t.cursor.samples_seen:
        return
    saver.newest = t.cursor.samples_seen
    t.ranks.until(lambda: saver.written)
    taken = snapshot(config, t, seconds)
    if t.ranks.rank == 0:
        saver.save(taken)


def _finish(t: Training, saver: Saver) -> None:
    """Until rank 0 has written and copied all, however long that takes."""
    t.ranks.until(lambda: saver.copied)
    saver.finish()


def _introduction(config: Config, t: Training) -> str:
    weights = sum(p.numel() for p in t.model.parameters())
    return (f"{config.run.folder}: {weights / 1e6:.1f} M weights, {t.data}, {len(t.recipe.kinds)} views of "
            f"{t.recipe.size} px, batch {config.optim.batch_size}, {config.optim.samples:,} samples to train on "
            f"{t.ranks.world} × {t.device}")


class Clock:
    """Rates since the last lap, and when the next checkpoint is due by the clock on the wall."""

    def __init__(self, config: Config, t: Training):
        self._begin = self._lap = self._saved = time.perf_counter()
        self._samples, self._waited, self._since = t.cursor.samples_seen, 0.0, 0.0
        texts = config.objective.texts
        self._flops, self._work = flops_by_length(t.model, len(t.recipe.kinds), config.optim.batch_size, texts), 0.0
        self._peak, self._every = peak_flops(t.device), 60 * config.run.save_every_minutes

    def waiting(self) -> "Clock":
        """Context in which the loop waits for data."""
        return self

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Generator[None]:
        """Within, time counts for no rate."""
        begin = time.perf_counter()
        yield
        self._lap += time.perf_counter() - begin

    def worked(self, samples: int, length: int) -> None:
        """A step of so many samples of the global batch is done, their texts encoded with `length` columns."""
        self._work += samples * self._flops[length]

    @property
    def total(self) -> float:
        """Seconds since the start of this process's training."""
        return time.perf_counter() - self._begin

    def due(self) -> bool:
        """Whether the last checkpoint is too long ago."""
        return time.perf_counter() - self._saved > self._every

    def saved(self) -> None:
        """A checkpoint is being written."""
        self._saved = time.perf_counter()

    def lap(self, t: Training) -> dict[str, float]:
        """Rates since the last call: samples and views of the global batch, TFLOP/s and MFU of one device, GiB of memory."""
        now, samples = time.perf_counter(), t.cursor.samples_seen
        took = max(now - self._lap, 1e-9)
        rate, work = (samples - self._samples) / took, self._work / t.ranks.world
        numbers = {"samples_per_second": rate, "views_per_second": rate * len(t.recipe.kinds),
                   "data_wait": self._waited / took, "tflops": work / took / 1e12, "memory_gib": _memory(t.device),
                   "seconds": t.seconds + self.total}
        if self._peak:
            numbers["mfu"] = work / took / self._peak
        self._lap, self._samples, self._waited, self._work = now, samples, 0.0, 0.0
        return numbers


def _memory(device: str) -> float:
    """Peak GiB: of the GPU where there is one, of this process otherwise."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

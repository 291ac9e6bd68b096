"""`check`: will this run work? What the configuration says of itself, what the machine has, and what the data holds."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from pipeline.loader import Indexed, group_ids
from pipeline.order import Order
from pipeline.plan import make_plan
from pipeline.sampling import draw_captions
from pipeline.skips import Forgotten
from pipeline.stream import Stream
from pipeline.text import CaptionTokenizer
from trainer import checkpoint
from trainer.config import Config, OptimConfig, RunConfig
from trainer.distributed import pick_device
from trainer.flops import PEAKS
from trainer.memory import Sizes, available, sizes_of
from trainer.mirror import Mirror
from trainer.training import make_tokenizer, open_data
from trainer.trial import trial
from trainer.verdict import Verdict, judged, tried

MODELLED, MODELLED_GPUS, MODELLED_MFU, MODELLED_GIB = "H200", 8, 0.4, 139
LOOKED_AT = 8192  # captions of the first batch, at most
LONG = 512  # tokens; a caption is cut at the context, and counted up to here


def check(config: Config, dry: bool = False, ranks: int = 0) -> Iterator[Verdict]:
    """Every verdict, as it is found; a piece that fails is one, too. Nothing is written where the run will write.

    dry: only what needs neither data nor training, for MODELLED devices. ranks: processes that the run will have; 0: one on
    every GPU, one on a CPU.
    """
    gpus = torch.cuda.device_count() if config.run.device != "cpu" else 0
    ranks = ranks or (MODELLED_GPUS if dry else max(gpus, 1))
    yield from _lengths(config.optim, config.run, ranks)
    known: list[Sizes] = []
    yield from tried("model", lambda: _model(config, ranks, dry, known))
    if dry:
        return
    if known:
        yield from tried("disk", lambda: _disk(config.run, known[0].checkpoint))
    opened: list[Indexed | Stream] = []
    yield from tried("data", lambda: _data(config, opened))
    if opened and known and known[0].fixed < available(pick_device(config.run.device)):
        yield from tried("trial", lambda: trial(config, ranks))


def _lengths(optim: OptimConfig, run: RunConfig, ranks: int) -> Iterator[Verdict]:
    """What the numbers of the configuration say of each other."""
    batch, share = optim.batch_size, optim.batch_size // ranks
    yield judged("steps", f"{-(-optim.samples // batch):,} of {batch:,} samples, {optim.samples:,} in all",
                 (optim.samples < batch, "bad", "the run ends inside its first batch: raise optim.samples"))
    warm = optim.warmup_samples / optim.samples
    yield judged("warm-up", f"{optim.warmup_samples:,} samples, {warm:.0%} of the run",
                 (warm >= 1, "bad", "the run ends before optim.lr is reached: lower optim.warmup_samples"),
                 (warm > 0.3, "warn", "a tenth of the run is usual: lower optim.warmup_samples"))
    yield judged("checkpoints", f"every {run.save_every_samples:,} samples, {optim.samples // run.save_every_samples:,} times, "
                 f"and every {run.save_every_minutes:g} minutes",
                 (run.save_every_samples > optim.samples, "warn", "by samples there is none: lower run.save_every_samples"),
                 (run.save_every_samples < batch, "warn", "every step ends in one: raise run.save_every_samples"))
    yield judged("processes", f"{ranks}, {share:,} groups of each batch to each",
                 (share < 1, "bad", "more processes than groups: raise optim.batch_size"),
                 (optim.accumulation > share, "warn", f"more parts than groups: optim.accumulation={max(share, 1)} or less"),
                 (batch % ranks > 0, "warn", f"the others wait for the largest share: use a multiple of {ranks}"))
    if optim.average_samples:
        yield judged("average", f"of about {optim.average_samples:,} samples",
                     (optim.average_samples > optim.samples, "warn", "it will be mostly what the run began with: lower "
                      "optim.average_samples"))


def _model(config: Config, ranks: int, dry: bool, known: list[Sizes]) -> Iterator[Verdict]:
    """Weights, memory, cost; adds the sizes to `known`."""
    device = "cuda" if dry else pick_device(config.run.device)
    free = MODELLED_GIB * 2**30 if dry else available(device) // (1 if device.startswith("cuda") else ranks)
    sizes = sizes_of(config, ranks, device)
    known.append(sizes)
    parts = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in sizes.weights.items() if count >= 5000)
    yield judged("weights", f"{sum(sizes.weights.values()) / 1e6:.2f} M, {sizes.trainable / 1e6:.2f} M learn: {parts}",
                 (sizes.fixed > free, "bad", f"with gradients and optimizer they need {_size(sizes.fixed)}: a smaller [model], "
                  "or run.sharding=fsdp on more devices"))
    needed = sum(sizes.memory.values())
    told = ", ".join(f"{name} {_size(size)}" for name, size in sizes.memory.items() if size)
    cure = "raise optim.accumulation, set run.recompute=true or run.precision=bf16, or lower optim.batch_size"
    yield judged("memory", f"modelled: {_size(needed)} of {_size(free)} on each {MODELLED if dry else device}: {told}",
                 (needed > free, "bad", cure), (needed > 0.85 * free, "warn", f"close to the edge: {cure}"))
    hours = config.optim.samples * sizes.flops / (MODELLED_MFU * PEAKS[MODELLED]) / 3600
    yield Verdict("cost", f"{sizes.flops / 1e9:,.1f} GFLOP a sample; modelled: {_hours(hours)} GPU-hours on {MODELLED}s at "
                          f"{MODELLED_MFU:.0%} MFU, {_hours(hours / MODELLED_GPUS)} hours on {MODELLED_GPUS} of them")


def _size(bytes_: float) -> str:
    return f"{bytes_ / 2**30:,.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:,.1f} MiB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else "less than 0.1"


def _disk(run: RunConfig, size: int) -> Iterator[Verdict]:
    """Folder, disk, mirror and wandb; the checkpoint that is being written comes on top of those kept."""
    place = next(folder for folder in (run.folder, *run.folder.parents) if folder.exists())
    yield judged("folder", str(run.folder),
                 (not place.is_dir() or not os.access(place, os.W_OK), "bad", f"{place} cannot be written: set run.folder"),
                 ((run.folder / "checkpoints" / checkpoint.LATEST).is_file(), "warn",
                  f"it holds a run: `uniclip-train resume {run.folder}`, or set run.folder"))
    more = 2 if run.mirror else 1  # one is being written, one copied
    free, needed = shutil.disk_usage(place).free, (run.keep + more) * size
    yield judged("disk", f"{run.keep} + {more} checkpoints need {_size(needed)}, {_size(free)} are free",
                 (needed > free, "bad", "make room, lower run.keep, or set run.folder"),
                 (needed > 0.8 * free, "warn", "make room, or lower run.keep"))
    if run.wandb and importlib.util.find_spec("wandb") is None:
        yield Verdict("wandb", f"run.wandb = {run.wandb!r}, but it is not installed", "bad", "pip install wandb")
    if run.mirror:
        yield from tried("mirror", lambda: _mirror(run.mirror))


def _mirror(url: str) -> Iterator[Verdict]:
    yield judged("mirror", f"{url} answers", (bool(Mirror(url).newest()), "warn",
                                              f"it holds a run: `uniclip-train resume {url}`, or set run.mirror"))


def _data(config: Config, opened: list[Indexed | Stream]) -> Iterator[Verdict]:
    """Samples, epochs, takedowns, captions, sizes of images; adds the data to `opened`."""
    data = open_data(config.data)
    opened.append(data)
    if isinstance(data, Stream):
        yield Verdict("data", str(data))
        yield Verdict("left out", f"{len(data.skip_ids):,} ids by skip lists and takedowns")
        captions = list(islice(data.captions(), min(config.optim.batch_size, LOOKED_AT)))
        groups = group_ids(np.arange(len(captions)), np.full(len(captions), -1), captions)
    else:
        yield from tried("index", lambda: _index(data))
        yield from _amounts(config.optim, data)
        rows, captions, groups = _first_batch(data, config.run.seed, min(config.optim.batch_size, LOOKED_AT))
        columns, size = data.index.columns(rows), config.model.image.size
        small = float((np.minimum(columns["width"], columns["height"]) < size).mean())
        yield judged("images", f"{small:.0%} are smaller than model.image.size = {size}, the middle one has "
                     f"{np.median(np.minimum(columns['width'], columns['height'])):.0f} pixels",
                     (small > 0.5, "warn", "most would be scaled up: lower model.image.size"))
    twins = 1 - len(np.unique(groups)) / len(groups)
    yield judged("twins", f"{twins:.1%} of a batch of {len(groups):,} repeat a sample, a duplicate or a caption of it",
                 (twins > 0.5, "bad", "few negatives are left: run `uniclip-data duplicates`, or lower optim.batch_size"),
                 (twins > 0.05, "warn", "run `uniclip-data duplicates` and filter, or lower optim.batch_size"))
    yield from _captions(config, data, captions)


def _index(data: Indexed) -> Iterator[Verdict]:
    """All of index.arrow is read."""
    data.index.check()
    where, told = data.index.folder, "it is what was written"
    yield Verdict("index", f"{told if data.index.file.sealed else 'it has no checksums: `index` or `merge` it again'}; "
                           f"`uniclip-data verify {where}` reads the tars, too")


def _amounts(optim: OptimConfig, data: Indexed) -> Iterator[Verdict]:
    left, every = len(data.plan), len(data.index)
    yield judged("data", f"{left:,} samples an epoch, {optim.samples / left:,.1f} epochs",
                 (optim.batch_size > left, "bad", f"a batch is more than all of them: optim.batch_size={left} or less"),
                 (optim.batch_size > left / 4, "warn", "a batch is a large part of them: more data, or lower optim.batch_size"))
    skipped = len(data.plan.skipped)
    taken = np.unique(Forgotten.beside(data.index.folder, data.index.shards).id_array)
    gone = len(make_plan(data.index, None, taken).skipped) if len(taken) else 0
    yield judged("left out", f"{skipped:,} of {every:,} by skip lists, {gone:,} by takedowns since the index was made",
                 (skipped + gone > every / 2, "warn", "more than half: check data.skip, or index the set again"))


def _first_batch(data: Indexed, seed: int, batch: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Rows, captions and group ids of the first batch of the run."""
    rows, epochs, repeats = Order(seed, data.plan).places(0, batch)
    columns, choices = data.index.columns(rows), [data.index.captions(int(row)) for row in rows]
    drawn = draw_captions(seed, epochs, repeats, columns["sample_id"], np.array([len(c) for c in choices]))
    captions = [c[d] for c, d in zip(choices, drawn, strict=True)]
    return rows, captions, group_ids(columns["sample_id"], columns["group"], captions)


def _captions(config: Config, data: Indexed | Stream, captions: list[str]) -> Iterator[Verdict]:
    text = config.model.text
    tokenizer = CaptionTokenizer.from_json(make_tokenizer(text, data, config.init.text).to_json(), LONG)
    tokens = np.argmax(tokenizer(captions) == tokenizer.end_id, axis=1) + 1
    empty, cut = float((tokens <= 2).mean()), float((tokens > text.context).mean())
    yield judged("captions", f"{tokens.mean():.1f} tokens on average, {cut:.1%} cut at {text.context}, {empty:.1%} empty",
                 (empty > 0.1, "bad", "leave them out: `uniclip-data filter`"),
                 (cut > 0.5, "bad", f"most lose their end: model.text.context={int(np.quantile(tokens, 0.99))}"),
                 (empty > 0, "warn", "leave them out: `uniclip-data filter`"),
                 (cut > 0.05, "warn", f"model.text.context={int(np.quantile(tokens, 0.99))} holds 99 of 100"))

"""The training loop: next batch, forward, loss, backward, step, log, save."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.console import InputError, WorkFailed, say
from pipeline.ledger import Ledger
from pipeline.loader import Indexed
from pipeline.plan import read_skip_lists
from pipeline.reader import Place
from pipeline.recipe import Cursor, Recipe
from pipeline.stream import Stream
from pipeline.text import CaptionTokenizer
from trainer import checkpoint
from trainer.config import Config, DataConfig, TextConfig
from trainer.log import LEDGER, Log
from trainer.losses import LOSSES
from trainer.model import UniCLIP
from trainer.optim import learning_rate, make_optimizer
from trainer.similarity import comparable_offsets


@dataclass
class Training:
    """Everything a run consists of besides its configuration, fresh or restored."""

    model: UniCLIP
    optimizer: torch.optim.Optimizer
    tokenizer: CaptionTokenizer
    data: Indexed | Stream
    recipe: Recipe
    cursor: Cursor
    device: str
    step: int = 0
    seconds: float = 0.0


def pick_device(name: str) -> str:
    """"auto" is CUDA where there is a GPU. Raises InputError for a CUDA device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"run.device = {name!r}, but torch sees no CUDA device: set run.device=cpu or auto")
    return name


def open_data(config: DataConfig) -> Indexed | Stream:
    """What [data] names. Raises InputError."""
    skip_ids = read_skip_lists(config.skip)
    if config.index is None:
        return Stream.open(config.stream or "", skip_ids)
    place = Place(config.shards, config.cache, int(config.cache_gb * 2**30), config.read_timeout)
    return Indexed.open(config.index, config.weights, skip_ids, place)


def make_tokenizer(config: TextConfig, data: Indexed | Stream) -> CaptionTokenizer:
    """CLIP's vocabulary, or one trained on the captions of the data."""
    if config.vocabulary == "clip":
        return CaptionTokenizer.clip(config.context)
    return CaptionTokenizer.train(data.captions(), config.vocab_size, config.context)


def start(config: Config) -> Training:
    """A run at its beginning. Raises InputError when its folder already holds one."""
    folder = config.run.folder
    if (folder / "checkpoints" / checkpoint.LATEST).is_file():
        raise InputError(f"{folder} already holds a run: go on with `uniclip-train resume {folder}`, or choose another "
                         "with --set run.folder=…")
    data = open_data(config.data)
    return _assemble(config, data, make_tokenizer(config.model.text, data))


def resume(folder: Path) -> tuple[Config, Training]:
    """A run at its latest complete checkpoint. Raises InputError when the data is not what it was."""
    source = checkpoint.find(folder)
    loaded = checkpoint.load_model(folder)
    state = checkpoint.read_state(source)
    config = loaded.config.model_copy(update={"run": loaded.config.run.model_copy(update={"folder": loaded.run})})
    training = _assemble(config, open_data(config.data), loaded.tokenizer)
    training.cursor.refuse_other(state.cursor)
    checkpoint.restore(source, training.model, training.optimizer)
    training.cursor, training.step, training.seconds = state.cursor, state.step, state.seconds
    return config, training


def _assemble(config: Config, data: Indexed | Stream, tokenizer: CaptionTokenizer) -> Training:
    device = pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    model = UniCLIP(config.model, tokenizer.vocab_size, tokenizer.end_id, config.learns_offset)
    if not config.learns_offset:
        model.similarity.offset.requires_grad_(False)
    model.to(device)
    recipe = Recipe(config.data.kinds(), config.model.image.size, config.data.executor, config.data.threads)
    cursor = Cursor(config.run.seed, 0, data.fingerprint, recipe.fingerprint(**data.chosen))
    return Training(model, make_optimizer(model, config.optim), tokenizer, data, recipe, cursor, device)


def train(config: Config, t: Training) -> Path:
    """Train from where `t` stands to `optim.samples` → the last checkpoint's folder.

    Raises WorkFailed when the loss or its gradient is not finite, or too many samples are bad.
    """
    run, optim = config.run, config.optim
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("training on several processes is not there yet: start one process, without torchrun")
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / checkpoint.CONFIG).write_text(config.to_toml())
    log = Log(run.folder, optim.samples, t.cursor.samples_seen)
    if t.cursor.samples_seen == 0:
        saved = _save(config, t)
        say(_introduction(config, t))
    else:
        saved = checkpoint.find(run.folder)
        say(f"resuming {run.folder} at {t.cursor.samples_seen:,} samples")
    ledger = Ledger.resumed(run.folder / LEDGER, config.data.bad_sample_budget, t.cursor.samples_seen)
    loader = t.data.loader(t.tokenizer, t.recipe, t.cursor, optim.batch_size, t.device, ledger=ledger)
    loss_of, bf16 = LOSSES[config.loss.name], run.precision == "bf16"
    stream, clock = iter(loader), Clock(t.cursor.samples_seen)
    try:
        while t.cursor.samples_seen < optim.samples:
            with clock.waiting():
                batch, after = next(stream)

            rate = learning_rate(optim, t.cursor.samples_seen)
            for group in t.optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(torch.device(t.device).type, torch.bfloat16, enabled=bf16):
                z_image_BVD, z_text_BTD = t.model(batch.views, batch.vectors, batch.tokens)
            temperature_3, offset_3 = t.model.similarity()
            loss = loss_of(z_image_BVD.float(), z_text_BTD.float(), temperature_3, offset_3, config.loss.supervision,
                           batch.group_id, batch.valid)

            t.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            gradient = nn.utils.clip_grad_norm_(t.model.parameters(), optim.clip)
            if not torch.isfinite(loss + gradient):
                raise WorkFailed(f"loss {loss.item():.4g}, gradient norm {gradient.item():.4g} at {after.samples_seen:,} "
                                 f"samples: not finite; weights are as of {saved}; lower optim.lr or use run.precision=fp32")
            t.optimizer.step()
            t.model.similarity.clamp_()

            before, t.cursor, t.step = t.cursor.samples_seen, after, t.step + 1
            done = after.samples_seen >= optim.samples
            if t.step % run.log_every == 0 or done:
                log.write({"step": t.step, "samples": after.samples_seen, "loss": loss.item(), "lr": rate,
                           "grad_norm": gradient.item(), "temperature": temperature_3.tolist(),
                           "offset": comparable_offsets(temperature_3, offset_3).tolist(),
                           **clock.lap(after.samples_seen), "seconds": t.seconds + clock.total})
            if done or after.samples_seen // run.save_every_samples > before // run.save_every_samples:
                saved = _save(config, t, t.seconds + clock.total)
    finally:
        stream.close()
        log.close()
    return saved


class Clock:
    """Samples per second, and the share of time spent waiting for data, since the last lap."""

    def __init__(self, samples: int):
        self._begin = self._lap = time.perf_counter()
        self._samples, self._waited, self._since = samples, 0.0, 0.0

    def waiting(self) -> "Clock":
        """Context in which the loop waits for data."""
        return self

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._since

    @property
    def total(self) -> float:
        """Seconds since the start of this process's training."""
        return time.perf_counter() - self._begin

    def lap(self, samples: int) -> dict[str, float]:
        """{samples_per_second, data_wait} since the last call."""
        now = time.perf_counter()
        took = max(now - self._lap, 1e-9)
        rates = {"samples_per_second": (samples - self._samples) / took, "data_wait": self._waited / took}
        self._lap, self._samples, self._waited = now, samples, 0.0
        return rates


def _save(config: Config, t: Training, seconds: float = 0.0) -> Path:
    return checkpoint.save(config.run.folder, t.model, t.optimizer, t.tokenizer, config, t.step, t.cursor, seconds,
                           config.run.keep)


def _introduction(config: Config, t: Training) -> str:
    weights = sum(p.numel() for p in t.model.parameters())
    return (f"{config.run.folder}: {weights / 1e6:.1f} M weights, {t.data}, {len(t.recipe.kinds)} views of "
            f"{t.recipe.size} px, batch {config.optim.batch_size}, {config.optim.samples:,} samples to train on {t.device}")

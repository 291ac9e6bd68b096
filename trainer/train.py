"""The training loop: next batch, forward, loss, backward, step, log, save."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.console import InputError, WorkFailed, say
from pipeline.ledger import Ledger
from pipeline.loader import Indexed
from pipeline.plan import read_skip_lists
from pipeline.reader import Place
from pipeline.recipe import Cursor, Recipe
from pipeline.schema import Batch
from pipeline.stream import Stream
from pipeline.text import CaptionTokenizer
from trainer import checkpoint
from trainer.config import Config, DataConfig, TextConfig
from trainer.diagnostics import chance_loss
from trainer.distributed import ALONE, Ranks, Step, chunks, forward_backward, parallel, process_group
from trainer.log import LEDGER, Log
from trainer.losses import NoValidGroup
from trainer.model import UniCLIP
from trainer.optim import learning_rate, make_optimizer
from trainer.similarity import comparable_offsets
from trainer.tiles import tiled_loss


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


def run(config: Config) -> Path:
    """Start a run, alone or as one of the processes that torchrun started → its last checkpoint. Raises InputError."""
    with process_group(config.optim.batch_size, pick_device(config.run.device)) as (ranks, device):
        return train(config, start(config, device), ranks)


def resume(folder: Path) -> Path:
    """Go on with the run in `folder`, on any number of processes → its last checkpoint. Raises InputError."""
    config = checkpoint.load_model(folder).config
    with process_group(config.optim.batch_size, pick_device(config.run.device)) as (ranks, device):
        return train(*restored(folder, device), ranks)


def start(config: Config, device: str | None = None) -> Training:
    """A run at its beginning. Raises InputError when its folder already holds one."""
    folder = config.run.folder
    if (folder / "checkpoints" / checkpoint.LATEST).is_file():
        raise InputError(f"{folder} already holds a run: go on with `uniclip-train resume {folder}`, or choose another "
                         "with --set run.folder=…")
    data = open_data(config.data)
    return _assemble(config, data, make_tokenizer(config.model.text, data), device)


def restored(folder: Path, device: str | None = None) -> tuple[Config, Training]:
    """A run at its latest complete checkpoint. Raises InputError when the data is not what it was."""
    source = checkpoint.find(folder)
    loaded = checkpoint.load_model(folder)
    state = checkpoint.read_state(source)
    config = loaded.config.model_copy(update={"run": loaded.config.run.model_copy(update={"folder": loaded.run})})
    training = _assemble(config, open_data(config.data), loaded.tokenizer, device)
    training.cursor.refuse_other(state.cursor)
    checkpoint.restore(source, training.model, training.optimizer)
    training.cursor, training.step, training.seconds = state.cursor, state.step, state.seconds
    return config, training


def _assemble(config: Config, data: Indexed | Stream, tokenizer: CaptionTokenizer, device: str | None) -> Training:
    device = device or pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    model = checkpoint.make_model(config, tokenizer)
    model.to(device)
    recipe = Recipe(config.data.kinds(), config.model.image.size, config.data.executor, config.data.threads)
    cursor = Cursor(config.run.seed, 0, data.fingerprint, recipe.fingerprint(**data.chosen))
    return Training(model, make_optimizer(model, config.optim), tokenizer, data, recipe, cursor, device)


def train(config: Config, t: Training, ranks: Ranks = ALONE) -> Path:
    """Train from where `t` stands to `optim.samples` → the last checkpoint's folder.

    Raises WorkFailed when the loss or its gradient is not finite, or too many samples are bad. Rank 0 writes.
    """
    run, optim, writes = config.run, config.optim, ranks.rank == 0
    step = parallel(Step(t.model, run.precision == "bf16"), ranks, t.device)  # waits for all: none looks at the folder after
    saved = _open(config, t) if writes else run.folder
    log = Log(run.folder, optim.samples, t.cursor.samples_seen) if writes else None
    ranks.wait()  # nobody reads or adds to the ledger before rank 0 has cut it back
    ledger = Ledger.resumed(run.folder / LEDGER, config.data.bad_sample_budget, t.cursor.samples_seen)
    loader = t.data.loader(t.tokenizer, t.recipe, t.cursor, optim.batch_size, t.device, ranks.rank, ranks.world, ledger)
    loss_of = partial(_loss, config, ranks)
    stream, clock = iter(loader), Clock(t.cursor.samples_seen)
    try:
        while t.cursor.samples_seen < optim.samples:
            with clock.waiting():
                batch, after = next(stream)

            rate = learning_rate(optim, t.cursor.samples_seen)
            for group in t.optimizer.param_groups:
                group["lr"] = rate
            t.optimizer.zero_grad(set_to_none=True)
            parts = chunks(optim.accumulation, batch.views, batch.vectors, batch.tokens)
            try:
                loss = forward_backward(step, parts, partial(loss_of, batch), ranks)
            except NoValidGroup as error:
                raise WorkFailed(f"{error}: no image before {after.samples_seen:,} samples could be decoded, see "
                                 f"{run.folder / LEDGER}") from None
            gradient = nn.utils.clip_grad_norm_(t.model.parameters(), optim.clip)
            if not torch.isfinite(loss + gradient):  # both are the global batch's: all ranks stop together
                raise WorkFailed(f"loss {loss.item():.4g}, gradient norm {gradient.item():.4g} at {after.samples_seen:,} "
                                 f"samples: not finite; weights are as of {saved}; lower optim.lr or use run.precision=fp32")
            t.optimizer.step()
            t.model.similarity.clamp_()

            before, t.cursor, t.step = t.cursor.samples_seen, after, t.step + 1
            done = after.samples_seen >= optim.samples
            if log and (t.step == 1 or t.step % run.log_every == 0 or done):
                temperature_3, offset_3 = (x.detach() for x in t.model.similarity())
                chance = chance_loss(config.loss.name, config.loss.supervision, optim.batch_size, len(batch.views),
                                     batch.tokens.shape[1], config.model.dim, temperature_3, offset_3)
                log.write({"step": t.step, "samples": after.samples_seen, "loss": loss.item(), "chance_loss": chance,
                           "lr": rate, "grad_norm": gradient.item(), "temperature": temperature_3.tolist(),
                           "offset": comparable_offsets(temperature_3, offset_3).tolist(),
                           **clock.lap(after.samples_seen), "seconds": t.seconds + clock.total})
            if writes and (done or after.samples_seen // run.save_every_samples > before // run.save_every_samples):
                saved = _save(config, t, t.seconds + clock.total)
    finally:
        stream.close()
        if log:
            log.close()
    return saved


def _loss(config: Config, ranks: Ranks, batch: Batch, image_BVD: Tensor, text_BTD: Tensor, temperature_3: Tensor,
          offset_3: Tensor) -> Tensor:
    """The global batch's loss; embeddings are normalised in float32 whatever the towers' precision."""
    return tiled_loss(config.loss.name, image_BVD.float(), text_BTD.float(), temperature_3, offset_3,
                      config.loss.supervision, batch.group_id, batch.valid, ranks=ranks,
                      dtype=torch.bfloat16 if config.run.precision == "bf16" else None)


def _open(config: Config, t: Training) -> Path:
    """The run's folder as it must be before the first step → the checkpoint that stands there."""
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / checkpoint.CONFIG).write_text(config.to_toml())
    if t.cursor.samples_seen:
        say(f"resuming {folder} at {t.cursor.samples_seen:,} samples")
        checkpoint.point_at(checkpoint.folder_of(folder, t.cursor))
        return checkpoint.find(folder)
    say(_introduction(config, t))
    return _save(config, t)


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

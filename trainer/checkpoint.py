"""A checkpoint is a folder, complete when its state.json is there and its hashes hold; `latest` is a small pointer file.

    RUN/checkpoints/000001600/model.safetensors optimizer.pt tokenizer.json config.toml state.json [average.safetensors]
    RUN/checkpoints/latest
"""

import json
import os
import shutil
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.console import InputError, WorkFailed
from pipeline.files import replacing, sha256_of
from pipeline.recipe import Cursor
from pipeline.seals import open_json, write_sealed_json
from pipeline.text import CaptionTokenizer
from trainer.config import Config
from trainer.config_file import as_changed, changed, load_config
from trainer.mirror import named, superseded
from trainer.model import UniCLIP
from trainer.weights_file import fitting, one_line, read_pickle, read_safetensors, refuse_misfits

WEIGHTS, AVERAGE, OPTIMIZER, TOKENIZER, CONFIG, STATE, LATEST = (
    "model.safetensors", "average.safetensors", "optimizer.pt", "tokenizer.json", "config.toml", "state.json", "latest")
_NEEDED = {WEIGHTS, OPTIMIZER, TOKENIZER, CONFIG}
FAILURES = "failures"  # folder of a run: checkpoints without optimizer, see trainer.failures


@dataclass(frozen=True)
class State:
    """Where a run stands. `seconds` is the training time so far; `skipped` updates were left out; `hashes`: sha256 by file."""

    step: NonNegativeInt
    cursor: Cursor
    seconds: float
    skipped: NonNegativeInt
    hashes: dict[str, str]


@dataclass(frozen=True)
class Tensors:
    """Weights by name, the optimizer's state by parameter name, the moving average of the weights where there is one.

    memory: what an objective remembers of earlier batches, by name.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None
    rng: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, in memory."""

    tensors: Tensors
    tokenizer: str
    config: str
    step: int
    cursor: Cursor
    seconds: float
    skipped: int

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        def of(state: Any) -> int:
            values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
            return state.nbytes if isinstance(state, Tensor) else sum(map(of, values))
        tensors = self.tensors
        return of([tensors.weights, tensors.optimizer, tensors.average, tensors.memory])


@dataclass(frozen=True)
class Loaded:
    """A model ready for use, and what it came from."""

    model: UniCLIP
    tokenizer: CaptionTokenizer
    image_size: int
    config: Config
    weights_sha256: str
    folder: Path
    run: Path


def save(run: Path, taken: Snapshot, keep: int, in_use: Collection[Path] = ()) -> Path:
    """Write a checkpoint, move `latest` to it, remove all but the `keep` newest and those `in_use` → its folder.

    Raises WorkFailed (disk full, read-only).
    """
    folder = folder_of(run, taken.cursor)
    size = f"a checkpoint needs {taken.nbytes / 2**20:,.1f} MiB"
    cure = (f"the checkpoint before it is whole; make room ({size}), then `uniclip-train resume {run}`"
            if (run / "checkpoints" / LATEST).is_file() else
            f"it is the run's first; make room ({size}), then give the same command again")
    with writing(folder, cure):
        write(folder, taken)
        point_at(folder)
        retain(run / "checkpoints", keep, in_use)
    return folder


@contextmanager
def writing(folder: Path, cure: str) -> Generator[None]:
    """Within, a full disk is a WorkFailed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save and safetensors wrap the system's error
        told = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise WorkFailed(f"{folder} could not be written ({told}): {cure}") from error


def write(folder: Path, taken: Snapshot) -> None:
    """The files of a checkpoint; state.json is written last: without it a folder is none."""
    shutil.rmtree(folder, ignore_errors=True)  # torn by a kill; never what `latest` names, see point_at
    folder.mkdir(parents=True)
    save_file(taken.tensors.weights, folder / WEIGHTS)
    if taken.tensors.average is not None:
        save_file(taken.tensors.average, folder / AVERAGE)
    torch.save({"optimizer": taken.tensors.optimizer, "rng": taken.tensors.rng, "memory": taken.tensors.memory},
               folder / OPTIMIZER)
    (folder / TOKENIZER).write_text(taken.tokenizer, encoding="utf-8")
    (folder / CONFIG).write_text(taken.config, encoding="utf-8")
    hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    for name in hashes:
        _sync(folder / name)
    write_sealed_json(folder / STATE, asdict(State(taken.step, taken.cursor, taken.seconds, taken.skipped, hashes)))


def folder_of(run: Path, cursor: Cursor) -> Path:
    """Where the checkpoint at `cursor` lives."""
    return run / "checkpoints" / f"{cursor.samples_seen:012d}"


def point_at(folder: Path) -> None:
    """Make `latest` name this checkpoint. A run resumed from an older one goes back to it before it trains."""
    with replacing(folder.parent / LATEST) as temporary:
        temporary.write_text(folder.name, encoding="utf-8")


def _sync(path: Path) -> None:
    """Be sure that a written file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def retain(checkpoints: Path, keep: int, in_use: Collection[Path] = ()) -> None:
    """Remove what makes way for the newest checkpoint, see `mirror.superseded`, but for those `in_use`."""
    names = [path.name for path in checkpoints.iterdir() if path.is_dir()]
    for name in superseded(names, (checkpoints / LATEST).read_text(encoding="utf-8"), keep):
        if checkpoints / name not in in_use:
            shutil.rmtree(checkpoints / name)


def find(path: Path) -> Path:
    """A run folder or a checkpoint folder → the checkpoint's folder. Raises InputError."""
    pointer = path / "checkpoints" / LATEST
    folder = path
    if pointer.is_file():
        folder = pointer.parent / named(pointer.read_text(encoding="utf-8", errors="replace"), str(pointer))
    if not (folder / STATE).is_file():
        raise InputError(f"{folder} holds no checkpoint (no {STATE}): " + _others(path / "checkpoints"))
    return folder


def run_of(folder: Path) -> Path:
    """The run of a folder inside its checkpoints/ or failures/; the folder itself where that stands alone."""
    return folder.parent.parent if folder.parent.name in {"checkpoints", FAILURES} else folder


def _others(checkpoints: Path, damaged: Path | None = None) -> str:
    """Which complete checkpoints can be used instead."""
    whole = sorted(str(state.parent) for state in checkpoints.glob(f"*/{STATE}") if state.parent != damaged)
    return (f"use {' or '.join(reversed(whole))}" if whole else
            "give a run folder made by `uniclip-train run` or a folder inside its checkpoints/")


def read_state(folder: Path) -> State:
    """state.json of a checkpoint, with every file's hash verified. Raises InputError."""
    try:
        state = TypeAdapter(State).validate_json(json.dumps(open_json((folder / STATE).read_bytes())), strict=True)
    except (ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        told = f"{'.'.join(map(str, first['loc']))} {first['msg']}" if first else one_line(error)
        raise InputError(f"{folder / STATE} is damaged ({told}): {_others(folder.parent, folder)}") from None
    if not state.cursor.samples_seen >= 0:
        raise InputError(f"{folder / STATE} is damaged ({state.cursor.samples_seen} samples seen): "
                         f"{_others(folder.parent, folder)}")
    if missing := _NEEDED - set(state.hashes):
        raise InputError(f"{folder / STATE} tells no sha256 of {min(missing)}: {_others(folder.parent, folder)}")
    for name, digest in state.hashes.items():
        if Path(name).name != name or not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise InputError(f"{folder / name} is missing or does not match its sha256: {_others(folder.parent, folder)}")
    return state


def make_model(config: Config, tokenizer: CaptionTokenizer) -> UniCLIP:
    """The model that [model] describes, untrained. Raises InputError when timm or torch cannot build it."""
    try:
        return UniCLIP(config.model, tokenizer.vocab_size, tokenizer.end_id, config.learns_offset,
                       config.objective)
    except (ValueError, RuntimeError, AssertionError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise InputError(f"[model] cannot be built: {one_line(error)}: check model.image.arch, sizes and heads") from None


def assemble(config: Config, weights: Path, described: str) -> tuple[UniCLIP, CaptionTokenizer]:
    """The model of `config` with the weights of a file, and the tokenizer beside it. Raises InputError where one does not fit.

    Names and shapes are compared before memory is taken: a configuration from elsewhere may ask for any amount.
    """
    tensors = read_safetensors(weights)
    model, name = config.model, weights.parent / TOKENIZER
    try:
        tokenizer = CaptionTokenizer.from_json(name.read_text(encoding="utf-8"), model.text.context)
    except ValueError as error:
        raise InputError(f"{name} is not what this project writes ({one_line(error)}): use another copy of it") from None
    blocks = (model.image.depth or 0) + model.text.depth + model.head.depth
    if blocks > len(tensors):
        raise InputError(f"{weights} holds {len(tensors)} tensors, too few for the {blocks} blocks that {described} describes")
    with torch.device("meta"):
        refuse_misfits(make_model(config, tokenizer), tensors, weights, described)
    made = make_model(config, tokenizer)
    made.load_state_dict(tensors)
    return made, tokenizer


def load_model(path: str | Path, device: str = "cpu", average: bool = True) -> Loaded:
    """The model, tokenizer and configuration of a run or checkpoint folder; the model in evaluation mode.

    average: take the moving average of the weights where there is one. Raises InputError when there is no checkpoint or it
    is damaged.
    """
    folder = find(Path(path))
    state = read_state(folder)
    config = load_config(str(folder / CONFIG))
    name = AVERAGE if average and AVERAGE in state.hashes else WEIGHTS
    model, tokenizer = assemble(config, folder / name, f"{CONFIG} beside it")
    return Loaded(model.eval().to(device), tokenizer, config.model.image.size, config, state.hashes[name], folder,
                  run_of(folder))


def load_config_of(path: Path, overrides: Sequence[str] = ()) -> Config:
    """With what a run or checkpoint folder goes on: what may change as RUN/config.toml has it, or `overrides`.

    Raises InputError when there is none, or for an override that would make it another run.
    """
    folder = find(path)
    run, config = run_of(folder), load_config(str(folder / CONFIG))
    if (run / CONFIG).is_file():
        config = as_changed(config, load_config(str(run / CONFIG)))
    return changed(config.model_copy(update={"run": config.run.model_copy(update={"folder": run})}), overrides)


def read_tensors(folder: Path) -> Tensors:
    """What `resume` puts back; `read_state` has verified the files."""
    saved, average = read_pickle(folder / OPTIMIZER), folder / AVERAGE
    with fitting(folder / OPTIMIZER, "a run of uniclip-train"):
        optimizer, rng, memory = dict(saved["optimizer"]), saved["rng"], dict(saved.get("memory", {}))
        torch.Generator().set_state(rng)
    return Tensors(read_safetensors(folder / WEIGHTS), optimizer, read_safetensors(average) if average.is_file() else None,
                   rng, memory)

"""A checkpoint is a folder, complete when its state.json is there and its hashes hold; `latest` is a small pointer file.

    RUN/checkpoints/000001600/model.safetensors optimizer.pt tokenizer.json config.toml state.json
    RUN/checkpoints/latest
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.console import InputError, WorkFailed
from pipeline.recipe import Cursor
from pipeline.text import CaptionTokenizer
from trainer.config import Config, load_config
from trainer.model import UniCLIP

WEIGHTS, OPTIMIZER, TOKENIZER, CONFIG, STATE, LATEST = (
    "model.safetensors", "optimizer.pt", "tokenizer.json", "config.toml", "state.json", "latest")


@dataclass(frozen=True)
class State:
    """Where a run stands. `seconds` is the training time so far; `hashes` the sha256 of each other file."""

    step: int
    cursor: Cursor
    seconds: float
    hashes: dict[str, str]


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


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: str | bytes) -> None:
    """Write, and be sure that it is on the disk."""
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    _write(temporary, text)
    temporary.replace(path)


def save(run: Path, model: UniCLIP, optimizer: torch.optim.Optimizer, tokenizer: CaptionTokenizer, config: Config,
         step: int, cursor: Cursor, seconds: float, keep: int) -> Path:
    """Write a checkpoint, move `latest` to it, remove all but the `keep` newest → its folder.

    state.json is written last: without it a folder is no checkpoint. Raises WorkFailed (disk full, read-only).
    """
    folder = folder_of(run, cursor)
    try:
        shutil.rmtree(folder, ignore_errors=True)  # torn by a kill; never what `latest` names, see point_at
        folder.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
        torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, folder / OPTIMIZER)
        _write(folder / TOKENIZER, tokenizer.to_json())
        _write(folder / CONFIG, config.to_toml())
        hashes = {name: sha256_of(folder / name) for name in (WEIGHTS, OPTIMIZER, TOKENIZER, CONFIG)}
        for name in hashes:
            _sync(folder / name)
        _replace(folder / STATE, json.dumps(asdict(State(step, cursor, seconds, hashes)), indent=1))
        point_at(folder)
        _retain(run / "checkpoints", keep)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save and safetensors wrap the system's error
        raise WorkFailed(f"{folder} could not be written ({error}): the checkpoint before it is whole; make room, then "
                         f"`uniclip-train resume {run}`") from error
    return folder


def folder_of(run: Path, cursor: Cursor) -> Path:
    """Where the checkpoint at `cursor` lives."""
    return run / "checkpoints" / f"{cursor.samples_seen:012d}"


def point_at(folder: Path) -> None:
    """Make `latest` name this checkpoint. A run resumed from an older one goes back to it before it trains."""
    _replace(folder.parent / LATEST, folder.name)


def _sync(path: Path) -> None:
    """Be sure that a written file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _retain(checkpoints: Path, keep: int) -> None:
    latest = (checkpoints / LATEST).read_text()
    older = sorted(path for path in checkpoints.iterdir() if path.is_dir() and path.name != latest)
    for path in older[: max(len(older) - keep + 1, 0)]:
        shutil.rmtree(path)


def find(path: Path) -> Path:
    """A run folder or a checkpoint folder → the checkpoint's folder. Raises InputError."""
    pointer = path / "checkpoints" / LATEST
    folder = path / "checkpoints" / pointer.read_text().strip() if pointer.is_file() else path
    if not (folder / STATE).is_file():
        raise InputError(f"{folder} holds no checkpoint (no {STATE}): " + _others(path / "checkpoints"))
    return folder


def _others(checkpoints: Path) -> str:
    """Which complete checkpoints can be used instead."""
    whole = sorted(str(state.parent) for state in checkpoints.glob(f"*/{STATE}"))
    return (f"use {' or '.join(reversed(whole))}" if whole else
            "give a run folder made by `uniclip-train run` or a folder inside its checkpoints/")


def read_state(folder: Path) -> State:
    """state.json of a checkpoint, with every file's hash verified. Raises InputError."""
    try:
        values = json.loads((folder / STATE).read_text())
        state = State(values["step"], Cursor(**values["cursor"]), values["seconds"], values["hashes"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / STATE} is damaged ({error}): {_others(folder.parent)}") from None
    for name, digest in state.hashes.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise InputError(f"{folder / name} is missing or does not match its sha256: {_others(folder.parent)}")
    return state


def make_model(config: Config, tokenizer: CaptionTokenizer) -> UniCLIP:
    """The model that [model] describes, untrained. Raises InputError when timm cannot build it."""
    try:
        return UniCLIP(config.model, tokenizer.vocab_size, tokenizer.end_id, config.learns_offset)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:  # what timm and torch raise
        raise InputError(f"[model] cannot be built: {error}: check model.image.arch, sizes and heads") from None


def load_model(path: str | Path, device: str = "cpu") -> Loaded:
    """The model, tokenizer and configuration of a run or checkpoint folder; the model in evaluation mode.

    Raises InputError when there is none or it is damaged.
    """
    folder = find(Path(path))
    state = read_state(folder)
    config = load_config(str(folder / CONFIG))
    tokenizer = CaptionTokenizer.from_json((folder / TOKENIZER).read_text(), config.model.text.context)
    model = make_model(config, tokenizer)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise InputError(f"{folder / WEIGHTS} does not fit the model that {CONFIG} beside it describes: {error}") from None
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    return Loaded(model.eval().to(device), tokenizer, config.model.image.size, config, state.hashes[WEIGHTS], folder, run)


def restore(folder: Path, model: UniCLIP, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, optimizer and random state back, in place."""
    model.load_state_dict(load_file(folder / WEIGHTS))
    saved = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])

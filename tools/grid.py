"""A grid of ablations: tables of rows, each row a configuration, each cell a row with a seed. See tools.ablate."""

import fcntl
import hashlib
import json
import tomllib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from pydantic import Field, ValidationError, field_validator

from evaluation.outcomes import METRICS
from pipeline.console import InputError
from pipeline.evalsets import open_evalset
from pipeline.files import write_json
from pipeline.index import manifest_of
from tools.paper_rows import FULL, ROWS
from trainer.config import Config, Here, Section
from trainer.config_file import load_config

SEEN = {"whole": "done.json", "weak": "weak.json"}  # how the images of the evaluation set are seen → file of a cell


class Grid(Section):
    """What is run; see tools.ablate."""

    base: str
    folder: Here
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    tables: tuple[str, ...] = ()
    rows: dict[str, dict[str, tuple[str, ...]]] = {}
    full: dict[str, str] = {}
    evaluate: Here
    metric: str = "image_to_text_recall@1"

    @field_validator("metric")
    @classmethod
    def _of_retrieval(cls, given: str) -> str:
        known = [name for name, (whose, _, _) in METRICS.items() if whose != "class"]
        if given not in known:
            raise ValueError(f"{given} is none of {', '.join(known)}")
        return given

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Raises InputError."""
        try:
            grid = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} is no grid: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if unknown := set(grid.tables) - set(ROWS):
            raise InputError(f"{path}: no table {min(unknown)}; known: {', '.join(ROWS)}, others are written under [rows.NAME]")
        if wrong := [name for name, rows in grid.rows.items() if grid.full.get(name) not in rows]:
            raise InputError(f"{path}: full.{wrong[0]} must name one of its rows: {', '.join(grid.rows[wrong[0]])}")
        return grid

    def every_table(self) -> dict[str, tuple[dict[str, tuple[str, ...]], str]]:
        """Name → its rows, and the one that others are held against."""
        return {name: (ROWS[name], FULL[name]) for name in self.tables} | {
            name: (rows, self.full[name]) for name, rows in self.rows.items()}

    def every_cell(self) -> Iterator["Cell"]:
        """Of every row and seed; rows of different tables may share theirs."""
        for rows, _ in self.every_table().values():
            for seed in self.seeds:
                yield from (self.cell(overrides, seed) for overrides in rows.values())

    def cell(self, overrides: tuple[str, ...], seed: int) -> "Cell":
        """Raises InputError for overrides that do not go together."""
        placed = [*self.overrides, *overrides, f"run.seed={seed}"]
        config = load_config(self.base, [*placed, f"run.folder={self.folder}"])
        folder = self.cells / hashlib.sha256(config.to_toml().encode()).hexdigest()[:12]
        data = manifest_of(config.data.index).get("fingerprint", "") if config.data.index else ""
        return Cell(folder, config, [word for override in (*placed, f"run.folder={folder / 'run'}")
                                     for word in ("--set", override)], {"data": data, "evaluated": self.evaluated})

    @property
    def cells(self) -> Path:
        """Folder of the cells."""
        return self.folder / "cells"

    @cached_property
    def evaluated(self) -> str:
        """sha256 of the evaluation set, "" where it is not there any more."""
        return open_evalset(self.evaluate).manifest_sha256 if self.evaluate.exists() else ""


@dataclass(frozen=True)
class Cell:
    """One configuration with one seed; upon: digests of the data it is trained and evaluated on, as far as they are there."""

    folder: Path
    config: Config
    words: list[str]
    upon: dict[str, str]

    @property
    def done(self) -> dict | None:
        """What its evaluation found; None before, and when it was another set or other data."""
        return self.found("whole")

    def found(self, seen: str) -> dict | None:
        """The same, with images seen in one of SEEN."""
        path = self.folder / SEEN[seen]
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found if found and all(found.get(name) == digest for name, digest in self.upon.items() if digest) else None

    def finish(self, seconds: float, metrics: dict[str, float], seen: str = "whole") -> None:
        """Write down what was found, after `seconds` of training. What else was seen of an earlier run goes."""
        if seen == "whole":
            (self.folder / SEEN["weak"]).unlink(missing_ok=True)
        found = {"seconds": seconds, "overrides": self.words[1::2], **self.upon, "metrics": metrics}
        write_json(self.folder / SEEN[seen], found)

    @contextmanager
    def alone(self) -> Generator[IO | None]:
        """Hold the cell, also for processes that are handed the file; None when another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield lock

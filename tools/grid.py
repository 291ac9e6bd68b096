"""A grid of ablations: tables of rows, each row a configuration, each cell a row with a seed. See tools.ablate."""

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from pipeline.console import InputError
from tools.paper_rows import FULL, ROWS
from trainer.config import Config, Here, Section
from trainer.config_file import load_config


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

    def cell(self, overrides: tuple[str, ...], seed: int) -> "Cell":
        """Raises InputError for overrides that do not go together."""
        placed = [*self.overrides, *overrides, f"run.seed={seed}"]
        config = load_config(self.base, [*placed, f"run.folder={self.folder}"])
        name = hashlib.sha256(config.to_toml().encode()).hexdigest()[:12]
        folder = self.folder / "cells" / name
        return Cell(folder, config, [word for override in (*placed, f"run.folder={folder / 'run'}")
                                     for word in ("--set", override)])


@dataclass(frozen=True)
class Cell:
    """One configuration with one seed."""

    folder: Path
    config: Config
    words: list[str]

    @property
    def done(self) -> dict | None:
        """What its evaluation found, None before."""
        path = self.folder / "done.json"
        return json.loads(path.read_text()) if path.is_file() else None

"""Tables and pictures of a grid's finished cells: mean ± standard error over seeds, differences seed by seed."""

import csv
import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import t

from pipeline.console import InputError
from tools.grid import SEEN, Grid
from tools.paper_rows import in_the_paper

COLUMNS = ("table", "row", "seeds", "mean", "standard_error", "difference", "difference_error", "difference_margin", "paper",
           "train_minutes")
HOW = {"whole": "whole", "weak": "as weak views"}
CELL_COLUMNS = ("table", "row", "seed", "cell", "value", "seconds")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds: NaN for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def margin(error: float, seeds: int) -> float:
    """Half the 95 % interval of a mean over so few seeds (Student's t); NaN for a single one."""
    return float(t.ppf(0.975, seeds - 1)) * error if seeds > 1 else math.nan


def table_of(grid: Grid, name: str, seen: str = "whole") -> list[dict]:
    """One line for each row that has a finished cell: percentages, differences to the full model seed by seed."""
    rows, full = grid.every_table()[name]
    found = {row: {seed: done for seed in grid.seeds if (done := grid.cell(overrides, seed).found(seen))}
             for row, overrides in rows.items()}
    lines = []
    for row, by_seed in found.items():
        value = {seed: 100 * done["metrics"][grid.metric] for seed, done in by_seed.items()}
        base = {seed: 100 * done["metrics"][grid.metric] for seed, done in found[full].items()}
        if not value:
            continue
        both = [value[seed] - base[seed] for seed in value if seed in base and row != full]
        difference, error = mean_and_error(both) if both else (math.nan, math.nan)
        minutes = statistics.fmean(done["seconds"] for done in by_seed.values()) / 60
        paper = in_the_paper(name, row)
        lines.append(dict(zip(COLUMNS, (name, row, len(value), *mean_and_error(list(value.values())), difference, error,
                                        margin(error, len(both)), math.nan if paper is None else paper, minutes),
                              strict=True)))
    return lines


def write_tables(grid: Grid, seen: str = "whole") -> str:
    """tables.csv, tables.md, tables.png and, cell by cell, cells.csv of what is finished → the text of tables.md.

    seen: a key of SEEN; of images that are not seen whole the files stand in a folder of that name.
    """
    tables = {name: table_of(grid, name, seen) for name in grid.every_table()}
    if not any(tables.values()) and (others := list(grid.cells.glob(f"*/{SEEN[seen]}"))):
        raise InputError(f"none of the {len(others)} finished cells in {grid.cells} is of this grid, whose settings, data or "
                         "place are others than theirs: its tables are left as they are; set another folder in the grid")
    folder = grid.folder if seen == "whole" else grid.folder / seen
    folder.mkdir(exist_ok=True)
    _write(folder / "tables.csv", COLUMNS, [line for lines in tables.values() for line in lines])
    _write(folder / "cells.csv", CELL_COLUMNS, list(_cells(grid, seen)))
    text = "\n".join(_markdown(grid, name, lines, seen) for name, lines in tables.items())
    (folder / "tables.md").write_text(text, encoding="utf-8")
    if any(tables.values()):
        draw(grid, tables, folder / "tables.png", seen)
    return text


def _write(path: Path, columns: tuple[str, ...], lines: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: "" if value != value else value for key, value in line.items()} for line in lines)


def _cells(grid: Grid, seen: str) -> Iterator[dict]:
    for name, (rows, _) in grid.every_table().items():
        for (row, overrides), seed in itertools.product(rows.items(), grid.seeds):
            if done := (cell := grid.cell(overrides, seed)).found(seen):
                yield dict(zip(CELL_COLUMNS, (name, row, seed, cell.folder.name, done["metrics"][grid.metric], done["seconds"]),
                               strict=True))


def draw(grid: Grid, tables: dict[str, list[dict]], path: Path, seen: str) -> None:
    """A row's mean as a dot, its standard error as a bar; the full model's mean as a line."""
    shown = {name: lines for name, lines in tables.items() if lines}
    height = 0.6 * len(shown) + 0.3 * sum(map(len, shown.values())) + 0.6
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[len(lines) + 1 for lines in shown.values()])[:, 0]
    for axis, (name, lines) in zip(axes, shown.items(), strict=True):
        axis.errorbar([x["mean"] for x in lines], range(len(lines)), fmt="o", capsize=3,
                      xerr=[0 if math.isnan(x["standard_error"]) else x["standard_error"] for x in lines])
        for x in lines:
            if x["row"] == grid.every_table()[name][1]:
                axis.axvline(x["mean"], color="gray", linewidth=0.8)
        axis.set(yticks=range(len(lines)), yticklabels=[x["row"] for x in lines], ylim=(len(lines) - 0.5, -0.5),
                 title=f"Table {name}")
    axes[-1].set_xlabel(f"{grid.metric}, images seen {HOW[seen]}, %")
    figure.savefig(path, dpi=120)


def _markdown(grid: Grid, name: str, lines: list[dict], seen: str) -> str:
    head = [f"## Table {name}", "",
            f"{grid.metric} in percent, images seen {HOW[seen]}, mean ± standard error over seeds; difference to "
            f"`{grid.every_table()[name][1]}` of the same seed, in bold where its 95 % interval excludes 0.", "",
            "| row | seeds | value | difference | paper | minutes |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(f"| {x['row']} | {x['seeds']} | {_with_error(x['mean'], x['standard_error'])} | "
                               f"{_difference(x)} | {_number(x['paper'], '.2f')} | "
                               f"{x['train_minutes']:.1f} |" for x in lines), ""])


def _difference(line: dict) -> str:
    told = _with_error(line["difference"], line["difference_error"], "+")
    return f"**{told}**" if abs(line["difference"]) > line["difference_margin"] else told


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _with_error(mean: float, error: float, sign: str = "") -> str:
    return _number(mean, f"{sign}.1f") + (f" ± {error:.1f}" if not math.isnan(error) else "")

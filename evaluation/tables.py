"""The numbers of a report for other programs (CSV) and for pasting (Markdown)."""

import csv
from pathlib import Path

from evaluation.paper import Table
from evaluation.results import Row
from pipeline.files import replacing
from pipeline.markup import markdown, spreadsheet

COLUMNS: tuple[str, ...] = (
    "dataset", "split", "task", "protocol", "metric", "value", "low", "high", "chance", "n", "main_metric", "alarm",
    "weights_sha256", "data_sha256", "prompts_sha256", "transform", "checkpoint", "seed", "created")


def write_csv(path: Path, rows: list[Row]) -> Path:
    """One line a number; values in 0…1."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: spreadsheet(value) for name, value in row.items()} |
                         {"low": row["interval"][0], "high": row["interval"][1]} for row in rows)
    return path


def write_markdown(path: Path, name: str, weights: str, rows: list[Row], tables: list[Table]) -> Path:
    """The results, and the paper's tables with ours as their last line."""
    lines = [f"# {markdown(name)}", "", f"Weights `{weights[:12]}`; 95 % intervals.", ""]
    lines += _markdown(("set", "task", "metric", "value", "95 % interval", "chance", "n"), [
        (row["dataset"], f"{row['task']}, {row.get('protocol', '')}", row["metric"], f"{row['value']:.1%}",
         f"{row['interval'][0]:.1%} – {row['interval'][1]:.1%}", f"{row['chance']:.1%}", f"{row['n']:,}") for row in rows])
    lines += [f"\n**{markdown(row['dataset'])}**: {markdown(row['alarm'])}" for row in rows if row.get("alarm")]
    notes = dict.fromkeys((row["dataset"], (row.get("details") or {}).get("note")) for row in rows)
    lines += [f"\n{markdown(dataset)}: {markdown(note)}" for dataset, note in notes if note]
    for table in tables:
        lines += ["", f"## {table.title}, %", "", *_markdown(("", *table.columns), [
            (line.name, *(shown(value) for value in line.values)) for line in table.lines])]
        lines += ["", table.note] if table.note else []
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shown(value: float | None) -> str:
    """A percentage for a table."""
    return "–" if value is None else f"{value:.1f}"


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(map(markdown, row)) + " |" for row in (columns, tuple("---" for _ in columns), *rows)]

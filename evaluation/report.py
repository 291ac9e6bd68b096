"""A run as one HTML page that opens anywhere: pictures and curves inside, nothing loaded, every caption escaped."""

import base64
import statistics
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from evaluation import examples, paper
from evaluation.curves import loss_curve, read_metrics, temperature_curve
from evaluation.evaluate import RESULTS
from evaluation.results import Row, read_rows
from evaluation.tables import shown as percentage
from evaluation.tables import write_csv, write_markdown
from pipeline.console import existing
from pipeline.files import replacing
from pipeline.versions import versions
from trainer import checkpoint

PAGE, VIEWS, METRICS = "report.html", "views.png", "metrics.jsonl"
TITLES = {"accuracy": "accuracy", "accuracy@5": "accuracy @5", "mean_per_class_recall": "mean per-class recall",
          "image_to_text_recall": "image → text R", "text_to_image_recall": "text → image R"}


def write(folder: Path, results: Path | None = None, out: Path | None = None) -> Path:
    """Write the page of a run folder, CSV and Markdown beside it → the page's path.

    Raises InputError when there is no run or no such results file.
    """
    existing(folder, "run folder", "give the folder that `uniclip-train run` wrote")
    if results:
        existing(results, "results file")
    results, out = results or folder / RESULTS, out or folder / PAGE
    latest = checkpoint.find(folder)
    state = checkpoint.read_state(latest)
    rows = read_rows(results)
    weights = _weights_shown(rows, state.hashes[checkpoint.WEIGHTS])
    metrics = read_metrics(folder / METRICS)
    shown = [row for row in rows if row["weights_sha256"] == weights]
    tables = paper.tables(shown)
    page = _environment().get_template("report.html.jinja").render(
        name=folder.resolve().name, rows=shown, older=[row for row in rows if row["weights_sha256"] != weights],
        weights=weights, tables=tables, ours=paper.OURS,
        facts=_facts(metrics, state, shown), versions=shown[-1]["versions"] if shown else versions(),
        curves=[Markup(draw(metrics)) for draw in (loss_curve, temperature_curve)] if metrics else [],
        examples=[entry for entry in examples.read(results) if entry["weights_sha256"] == weights],
        views=_data_uri(folder / VIEWS), config=(latest / checkpoint.CONFIG).read_text(encoding="utf-8"))
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_csv(out.with_suffix(".csv"), shown)
    write_markdown(out.with_suffix(".md"), folder.resolve().name, weights, shown, tables)
    return out


def _weights_shown(rows: list[Row], latest: str) -> str:
    """The latest checkpoint's weights, or, when nothing was measured on those, the last ones measured."""
    measured = [row["weights_sha256"] for row in rows]
    return latest if latest in measured or not measured else measured[-1]


def _facts(metrics: list[dict[str, Any]], state: checkpoint.State, shown: list[Row]) -> dict[str, str]:
    """What the header says, label → value."""
    samples = int(shown[-1]["checkpoint"]) if shown and shown[-1]["checkpoint"].isdecimal() else \
        state.cursor.samples_seen
    facts = {"samples seen": f"{samples:,}", "training time": _duration(state.seconds)}
    if metrics:
        facts["last loss"] = f"{metrics[-1]['loss']:.3f}"
        facts["samples/s, median"] = f"{statistics.median(m['samples_per_second'] for m in metrics):,.0f}"
        facts["waiting for data, median"] = f"{statistics.median(m['data_wait'] for m in metrics):.1%}".replace("%", " %")
    return facts


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.exists() else ""


def _title(metric: str) -> str:
    """A metric's name for readers: image_to_text_recall@5 → image → text R@5."""
    name, at, k = metric.partition("@")
    return TITLES.get(metric) or TITLES.get(name, name) + at + k


def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters |= {"title_of": _title, "percent": lambda share: f"{100 * share:.1f} %",
                            "percentage": percentage}
    return environment

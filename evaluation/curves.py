"""The course of a run as inline SVG that takes the page's text colour and needs nothing from outside."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipeline.console import InputError
from pipeline.seals import read_lines

INK = "#010203"  # stands for the page's text colour until the SVG is part of the page
COLOURS = ("#3b82c4", "#d9822b", "#3a9d6e")
DOMAIN_PAIRS = ("image–image", "image–text", "text–text")
_NEEDED = {"samples", "loss", "temperature", "samples_per_second", "data_wait"}
POINTS = 600  # a screen shows no more
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.15, "grid.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold"}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl, none when it is absent; a last line still being written is left out.

    Raises InputError for a damaged line.
    """
    cure = "remove the line: the curves will do without it"
    steps = {number: metrics for number, metrics in enumerate(read_lines(path, cure), 1) if "samples_per_second" in metrics
             or "loss" in metrics}  # the others are of evaluations
    for number, metrics in steps.items():
        if missing := _NEEDED - metrics.keys():  # a line of an older version has no checksum
            raise InputError(f"{path}, line {number} is damaged (it has no {min(missing)!r}): {cure}")
    return [*steps.values()]


def loss_curve(metrics: list[dict[str, Any]]) -> str:
    """Loss against samples."""
    figure, axes = _axes("Loss", metrics)
    shown = _thinned(metrics)
    axes.plot([m["samples"] for m in shown], [m["loss"] for m in shown], color=COLOURS[0], linewidth=1.6)
    return _svg(figure, "loss")


def temperature_curve(metrics: list[dict[str, Any]]) -> str:
    """The temperature τ of each domain pair against samples."""
    figure, axes = _axes("Temperature τ", metrics)
    shown = _thinned(metrics)
    for pair, (name, colour) in enumerate(zip(DOMAIN_PAIRS, COLOURS, strict=True)):
        axes.plot([m["samples"] for m in shown], [m["temperature"][pair] for m in shown], color=colour, label=name,
                  linewidth=1.6)
    axes.legend(loc="best", fontsize=9, frameon=False)
    return _svg(figure, "temperature")


def _thinned(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step = max(1, len(metrics) // POINTS)
    return metrics[::-step][::-1]  # counted from the end, so that the last line is shown


def _axes(title: str, metrics: list[dict[str, Any]]):
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_xlabel("samples seen")
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.set_xlim(0, metrics[-1]["samples"])
    return figure, axes


def _short(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _svg(figure: Figure, name: str) -> str:
    """The <svg> element alone: prolog, metadata and namespaces are for files, and name addresses of their own."""
    stream = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata=_NO_METADATA)
    text = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg"):])
    ids = set(re.findall(r'id="([^"]+)"', text))  # two figures on one page must not share ids
    for found in sorted(ids, key=len, reverse=True):
        text = re.sub(rf'(id="|href="#|url\(#){re.escape(found)}(?=["\)])', rf"\g<1>{name}-{found}", text)
    return text.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{name}"', 1)

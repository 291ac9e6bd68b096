"""A contact sheet: some samples with their captions on one HTML page that opens anywhere, every text escaped."""

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from pipeline.columns import COLUMNS, tables
from pipeline.console import existing
from pipeline.files import replacing
from pipeline.images import Undecodable, upright_rgb
from pipeline.index import Index
from pipeline.selection import Condition
from pipeline.skips import present

_TILE = 224  # pixels
_environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                           lstrip_blocks=True)


def image_bytes(index: Index, row: int) -> bytes:
    """The image of a row as it lies in its tar. Raises InputError where the tar is gone."""
    at = {name: values[0] for name, values in index.columns(np.array([row])).items()}
    tar = existing(index.folder / index.shards[at["shard"]], "the index's shard", "bring it back, or index again")
    with tar.open("rb") as file:
        file.seek(at["offset"])
        return file.read(at["size"])


def thumbnail(index: Index, row: int, side: int) -> Image.Image:
    """At most `side` pixels each way; a grey square for what cannot be decoded."""
    try:
        image = upright_rgb(image_bytes(index, row))
    except Undecodable:
        return Image.new("RGB", (side, side), "grey")
    image.thumbnail((side, side))
    return image


def _tile(index: Index, row: int) -> dict:
    file = io.BytesIO()
    thumbnail(index, row, _TILE).save(file, "JPEG", quality=85)
    at = {name: values[0] for name, values in index.columns(np.array([row])).items()}
    return {"image": base64.b64encode(file.getvalue()).decode(), "captions": index.captions(row),
            "source": index.source(row), "width": at["width"], "height": at["height"], "id": at["sample_id"],
            "group": at["group"]}


def _chosen(index: Index, conditions: list[Condition]) -> np.ndarray:
    kept = [np.logical_and.reduce([one.met(COLUMNS[one.column][1](table)) for one in conditions]) for table in tables(index)]
    return np.flatnonzero(np.concatenate(kept))


def peek(index: Index, out: Path, count: int = 60, seed: int = 0, conditions: list[Condition] | None = None) -> int:
    """Write the page; returns how many samples it shows."""
    rows = present(index)
    rows = np.intersect1d(rows, _chosen(index, conditions), assume_unique=True) if conditions else rows
    picked = np.sort(np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False))
    page = _environment.get_template("peek.html.jinja").render(
        name=index.folder.resolve().name, tiles=[_tile(index, int(row)) for row in picked], total=len(rows),
        chosen=", ".join(one.text for one in conditions or []), seed=seed, fingerprint=index.fingerprint)
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return len(picked)


def picture_sheet(index: Index, out: Path, columns: int = 8, rows: int = 3, side: int = 128) -> None:
    """Some samples as one picture."""
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    left = present(index)
    picked = np.sort(np.random.default_rng(0).choice(left, min(columns * rows, len(left)), replace=False))
    for place, row in enumerate(picked):
        image = thumbnail(index, int(row), side - 4)
        y, x = divmod(place, columns)
        sheet.paste(image, (x * side + (side - image.width) // 2, y * side + (side - image.height) // 2))
    with replacing(out) as temporary:
        sheet.save(temporary, "PNG")

"""Pictures of what the stream does: image with crop boxes, its views, each view's vector as bars; one view made again."""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pipeline.console import InputError, WorkFailed
from pipeline.images import Undecodable, upright_rgb
from pipeline.index import Index
from pipeline.order import Order
from pipeline.plan import effective_weights, find_sample, make_plan, read_skip_lists
from pipeline.reader import ShardReader
from pipeline.replay import pixels
from pipeline.sampling import KINDS, RECIPES, ViewKind, draw_captions, sample_vectors
from pipeline.schema import IDENTITY, VECTOR, VECTOR_SIZE
from pipeline.skips import Forgotten, present

COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02")
_CELL = 2.1  # inches


def _original(axes, image: Image.Image, vector_VA: np.ndarray, caption: str) -> None:
    axes.imshow(image)
    for v, (x, y, w, h) in enumerate(vector_VA[:, :4]):
        axes.add_patch(Rectangle((x * image.width, y * image.height), w * image.width, h * image.height, fill=False,
                                 edgecolor=COLORS[v % len(COLORS)], linewidth=2))
    axes.set_title(caption if len(caption) < 60 else caption[:57] + "…", fontsize=7, wrap=True)


def _bars(axes, vector_VA: np.ndarray) -> None:
    """Each number's distance from its identity; one row of bars a field, one colour a view."""
    change_VA = vector_VA - IDENTITY
    height = 0.8 / len(change_VA)
    for v, change_A in enumerate(change_VA):
        axes.barh(np.arange(len(VECTOR)) + v * height, change_A, height, color=COLORS[v % len(COLORS)])
    axes.set_yticks(np.arange(len(VECTOR)) + 0.4 - height / 2, [field.name for field in VECTOR], fontsize=6)
    axes.tick_params(axis="x", labelsize=6)
    axes.set_xlim(-1.05, max(1.05, float(change_VA.max()) * 1.05))
    axes.axvline(0, color="black", linewidth=0.5)
    axes.invert_yaxis()


def _row(axes, image: Image.Image, vector_VA: np.ndarray, caption: str, kinds: tuple[str, ...], size: int) -> None:
    _original(axes[0], image, vector_VA, caption)
    for v, vector_A in enumerate(vector_VA):
        axes[1 + v].imshow(pixels(image, vector_A, size))
        axes[1 + v].set_title(kinds[v], fontsize=8, color=COLORS[v % len(COLORS)])
    for panel in axes[:-1]:
        panel.set_xticks([])
        panel.set_yticks([])
    _bars(axes[-1], vector_VA)


def _image(index: Index, reader: ShardReader, row: int) -> Image.Image:
    """Raises WorkFailed for an image that cannot be read."""
    columns = index.columns(np.array([row]))
    try:
        return upright_rgb(reader.read(*(int(columns[name][0]) for name in ("shard", "offset", "size"))))
    except (OSError, Undecodable) as error:
        raise WorkFailed(f"{index.folder}: image {index.key(row)} cannot be read ({error}): index it again") from None


def _writable(out: Path, suffixes: set[str]) -> None:
    if out.suffix.lower() not in suffixes or not out.parent.is_dir():
        raise InputError(f"{out}: give a {', '.join(sorted(suffixes))} in a folder that exists")


@dataclass(frozen=True)
class Drawing:
    """What decides which samples come and how their views look.

    Names and kinds of the views, their size in pixels; the run's seed, its weights of sources and its skip lists.
    """

    names: tuple[str, ...]
    kinds: tuple[ViewKind, ...]
    size: int
    seed: int
    weights: dict[str, float] = field(default_factory=dict)
    skip: tuple[Path, ...] = ()

    @classmethod
    def of_recipe(cls, recipe: str, size: int, seed: int) -> "Drawing":
        """A recipe with the default ranges of its kinds. Raises InputError for one that is not known."""
        if recipe not in RECIPES:
            raise InputError(f"--recipe {recipe}: known are {', '.join(RECIPES)}")
        return cls(RECIPES[recipe], tuple(KINDS[name] for name in RECIPES[recipe]), size, seed)

    @classmethod
    def of_run(cls, config: Path) -> "Drawing":
        """What a run's resolved config.toml says. Raises InputError when it is none."""
        try:
            run = tomllib.loads(config.read_text(encoding="utf-8"))
            data, recipe = run["data"], run["data"]["recipe"]
            names = RECIPES[recipe] if isinstance(recipe, str) else tuple(recipe)
            told: list[dict[str, Any]] = [{key: tuple(value) if isinstance(value, list) else value
                                           for key, value in data[name].items()} for name in names]
            kinds = tuple(ViewKind(**kind) for kind in told)
            skip = tuple(map(Path, data.get("skip", ())))
            return cls(names, kinds, run["model"]["image"]["size"], run["run"]["seed"], data.get("weights", {}), skip)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{config} is no config.toml of a run ({error!r}): give the one in the run's folder") from None


def first_samples(index: Index, drawing: Drawing, samples: int) -> tuple[np.ndarray, ...]:
    """Rows, epochs and repeats of the first samples that a run sees; what was taken down is not drawn."""
    plan = make_plan(index, effective_weights(index, drawing.weights), read_skip_lists(drawing.skip))
    order, gone, count = Order(drawing.seed, plan), Forgotten.beside(index.folder, index.shards).id_array, samples
    while True:
        places = order.places(0, min(count, len(plan)))
        stays = ~np.isin(index.columns(places.rows)["sample_id"], gone)
        if stays.sum() >= samples or count >= len(plan):
            return tuple(column[stays][:samples] for column in places)
        count *= 2


def draw_views(index: Index, out: Path, drawing: Drawing, samples: int) -> int:
    """Write the picture of the first `samples` samples that a run would see; return how many views each.

    Raises InputError for a picture format that is not known, WorkFailed for an image that cannot be read.
    """
    _writable(out, {".png", ".pdf", ".svg"})
    views, size, seed = drawing.names, drawing.size, drawing.seed
    rows, epochs, repeats = first_samples(index, drawing, samples)
    columns = index.columns(rows)
    sizes = np.stack([columns["width"], columns["height"]], axis=1)
    vectors = sample_vectors(seed, epochs, repeats, columns["sample_id"], sizes, drawing.kinds)
    captions = [index.captions(int(row)) for row in rows]
    drawn = draw_captions(seed, epochs, repeats, columns["sample_id"], np.array([len(c) for c in captions]))
    reader = ShardReader(index.folder, index.shards)
    figure = Figure(figsize=(_CELL * (2.4 + len(views)), _CELL * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), 2 + len(views), squeeze=False, width_ratios=[1] * (1 + len(views)) + [1.4])
    for b, axes in enumerate(grid):
        _row(axes, _image(index, reader, int(rows[b])), vectors[b], captions[b][drawn[b]], views, size)
    reader.close()
    figure.savefig(out, dpi=110)
    return len(views)


def draw_replay(index: Index, out: Path, sample_id: int, vector: str, size: int) -> None:
    """Write the view that a logged (sample id, vector) stands for, as a picture of size × size pixels.

    vector: its numbers as a JSON list, as logs hold it. Raises InputError, WorkFailed.
    """
    _writable(out, {".png"})
    try:
        with np.errstate(over="ignore"):
            vector_A = np.array(json.loads(vector), np.float32)
    except (ValueError, TypeError):
        vector_A = np.empty(0, np.float32)
    if vector_A.shape != (VECTOR_SIZE,) or not np.isfinite(vector_A).all():
        raise InputError(f"--vector {vector}: give a JSON list of {VECTOR_SIZE} finite numbers "
                         f"({', '.join(field.name for field in VECTOR)})")
    row = find_sample(index, sample_id)
    if row is not None and row not in present(index):
        raise InputError(f"{index.folder}: the sample with id {sample_id} was taken down")
    if row is None:
        raise InputError(f"{index.folder} has no sample with id {sample_id}")
    reader = ShardReader(index.folder, index.shards)
    Image.fromarray(pixels(_image(index, reader, row), vector_A, size)).save(out)
    reader.close()

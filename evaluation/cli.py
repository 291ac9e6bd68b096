"""`uniclip-eval`: parse, call one function, print. Heavy imports live inside the commands."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evaluation.cli_data import data
from pipeline.console import InputError, WorkFailed, existing, quiet, run, say, show_table
from pipeline.console import app as make_app
from pipeline.console import out as console

if TYPE_CHECKING:
    from evaluation.evaluate import Bench

app = make_app("Zero-shot, probes, retrieval, fine-tuning, comparisons and reports, with intervals and provenance.",
               "uniclip-eval zeroshot runs/scenes-tiny evalsets/colour && uniclip-eval report runs/scenes-tiny")
app.add_typer(data, name="data")

PATIENCE_MINUTES = 24 * 60  # of the other ranks while the first one fits a probe

Paths = Annotated[list[Path], typer.Argument(metavar="[CHECKPOINT] SET...", help="A run folder, or a folder inside its "
                  "checkpoints/ (not with --open-clip), then set folders.")]
Split = Annotated[str, typer.Option(help="Which split of the sets.")]
Out = Annotated[Path | None, typer.Option(help="Results file; results.jsonl in the run folder when not given.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of features; features/ beside the results when not given.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Arch = Annotated[str | None, typer.Option("--open-clip", metavar="ARCH", help="Evaluate this open_clip model instead.")]
Weights = Annotated[Path | None, typer.Option(help="Weights file of the open_clip model.")]
Results = Annotated[Path | None, typer.Option(help="Results file; RUN/results.jsonl when not given.")]


@app.command()
def retrieval(paths: Paths, split: Split = "test", out: Out = None, cache: Cache = None, device: Device = "auto",
              open_clip: Arch = None, weights: Weights = None) -> None:
    """Recall@1, 5, 10 of captions for images and of images for captions.

    Example: `uniclip-eval retrieval runs/scenes-tiny demo/scenes/evalsets/retrieval`
    """
    _task("retrieval", paths, split, out, cache, device, open_clip, weights)


@app.command()
def zeroshot(paths: Paths, split: Split = "test", out: Out = None, cache: Cache = None, device: Device = "auto",
             open_clip: Arch = None, weights: Weights = None,
             templates: Annotated[str, typer.Option(help="set, imagenet-7, imagenet-80 or name.")] = "set") -> None:
    """Accuracy of naming the class of an image from prompts alone.

    Example: `uniclip-eval zeroshot runs/scenes-tiny demo/scenes/evalsets/colour demo/scenes/evalsets/shape`
    """
    _task("zeroshot", paths, split, out, cache, device, open_clip, weights, templates)


@app.command()
def probe(paths: Paths, split: Split = "test", out: Out = None, cache: Cache = None, device: Device = "auto",
          open_clip: Arch = None, weights: Weights = None) -> None:
    """Accuracy of a linear classifier on frozen features (CLIP's protocol); the sets need a split `train`.

    Example: `uniclip-eval probe runs/photos evalsets/clothing`
    """
    _task("probe", paths, split, out, cache, device, open_clip, weights)


@app.command()
def knn(paths: Paths, split: Split = "test", out: Out = None, cache: Cache = None, device: Device = "auto",
        open_clip: Arch = None, weights: Weights = None) -> None:
    """Accuracy of the 20 nearest training images' vote: seconds where the linear probe takes minutes.

    Example: `uniclip-eval knn runs/photos evalsets/clothing`
    """
    _task("knn", paths, split, out, cache, device, open_clip, weights)


@app.command()
def suite(
    paths: Annotated[list[Path], typer.Argument(metavar="[CHECKPOINT] ROOT", help="A run folder or checkpoint (not with "
                                                "--open-clip), then the folder of all sets.")],
    split: Split = "test", out: Out = None, cache: Cache = None, device: Device = "auto",
    open_clip: Arch = None, weights: Weights = None,
) -> None:
    """Every task on every set under a folder. Stopped anywhere and begun again, it goes on where it was.

    Example: `uniclip-eval suite runs/photos evalsets`
    """
    from evaluation.suite import suite as run_suite

    with _bench(paths, out, cache, device, open_clip, weights) as (bench, (root, *others)):
        if others:
            raise InputError(f"suite takes one folder of sets; {others[0]} is one too many")
        rows, left = run_suite(bench, root, split)
        _show(bench.out, rows)
        if not rows and bench.ranks.rank == 0:
            raise WorkFailed(f"nothing under {root} could be measured ({len(left)} reasons above)")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Run folder or results file of model A.")],
    b: Annotated[Path, typer.Argument(help="Run folder or results file of model B.")],
    every: Annotated[bool, typer.Option("--every", help="Every metric, not the main ones only.")] = False,
) -> None:
    """Is B better than A? A paired test on each number both have.

    Example: `uniclip-eval compare runs/clip runs/uniclip`
    """
    from evaluation.compare import compare as run_compare

    table = _table("set", "metric", "A", "B", "B − A", "p", "better", left=2)
    for c in run_compare(a, b, every):
        low, high = c.interval
        table.add_row(_named(c.row), c.row["metric"], f"{c.a:.1%}", f"{c.b:.1%}",
                      f"{100 * low:+.1f} … {100 * high:+.1f}", f"{c.p:.2g}", c.better)
    show_table(table)
    say("B − A: 95 % interval of the difference in points; p after Holm; better: only where p < 0.05")


@app.command()
def finetune(
    paths: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT SET", help="A run, checkpoint or export folder of ours, "
                                                "then a classification set with a split train.")],
    split: Annotated[str, typer.Option(help="What is measured, and not trained on: validation to choose a recipe, test once "
                                       "it is chosen.")] = "test",
    epochs: Annotated[int, typer.Option(min=1)] = 16,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the head and the last layer.")] = 3e-4,
    layer_decay: Annotated[float, typer.Option(help="Learning rate of a layer over that of the next.")] = 0.9,
    mixup: Annotated[float, typer.Option(help="Mixup's α; 0 turns it off.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="CutMix's α; 0 turns it off.")] = 0.0,
    smallest_crop: Annotated[float, typer.Option(help="Smallest share of a picture's area a crop may have.")] = 0.5,
    augment: Annotated[str, typer.Option(help="timm's auto_augment, such as rand-m9-mstd0.5-inc1; empty for none.")] = "",
    erasing: Annotated[float, typer.Option(help="Share of pictures with a patch erased.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    out: Out = None, device: Device = "auto", open_clip: Arch = None, weights: Weights = None,
) -> None:
    """Train the image tower and a classifier on a set, then test once. Run again, it goes on where it was stopped.

    The defaults are for small towers and thousands of pictures. For large towers and ImageNet: --batch-size 1024
    --layer-decay 0.65 --mixup 0.8 --cutmix 1 --augment rand-m9-mstd0.5-inc1 --erasing 0.25 --smallest-crop 0.08.

    Example: `uniclip-eval finetune runs/photos evalsets/clothing --split validation --epochs 8`
    """
    from evaluation.finetune import Recipe
    from evaluation.finetune import finetune as run_finetune

    recipe = Recipe(epochs, batch_size, lr, layer_decay, mixup, cutmix, smallest_crop=smallest_crop, augment=augment,
                    erasing=erasing, seed=seed)
    with _bench(paths, out, None, device, open_clip, weights) as (bench, (folder, *others)):
        if others or bench.ranks.world > 1:
            raise InputError(f"finetune takes one set; {others[0]} is one too many" if others else
                             "finetune runs in one process: start it without torchrun")
        _show(bench.out, run_finetune(bench, folder, recipe, split))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")],
    results: Results = None,
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html when not given.")] = None,
) -> None:
    """Write one self-contained HTML page about a run, and its tables as CSV and Markdown beside it.

    Example: `uniclip-eval report runs/scenes-tiny`
    """
    from evaluation.report import write

    say(f"report {write(folder, results, out)}")


@app.command("clip-benchmark", context_settings={"allow_extra_args": True, "ignore_unknown_options": True,
                                                 "help_option_names": ["--help"]})
def clip_benchmark(context: typer.Context) -> None:
    """Run the unmodified CLIP_benchmark on a checkpoint of ours: all that follows is for its own command line.

    Example: `uniclip-eval clip-benchmark eval --pretrained runs/photos --dataset wds/colour --dataset_root evalsets/colour
    --no_amp --num_workers 1 --output colour.json`
    """
    from evaluation.bridge import clip_benchmark as run_it

    run_it(context.args)


@contextmanager
def _bench(paths: list[Path], out: Path | None, cache: Path | None, device: str, open_clip: str | None,
           weights: Path | None) -> "Iterator[tuple[Bench, list[Path]]]":
    """The model with its files and, under torchrun, its ranks, of which one speaks; and the paths that are not the model's."""
    _look_for(paths, open_clip)
    from evaluation.evaluate import Bench
    from evaluation.subject import DEVICE, checkpoint_subject, open_clip_subject
    from trainer.batches import IMAGE_BATCH
    from trainer.distributed import pick_device, process_group

    if (open_clip is None) != (weights is None):
        raise InputError("--open-clip ARCH and --weights FILE go together")
    cure = "start again: what is finished is kept"
    with process_group(IMAGE_BATCH, pick_device(device, DEVICE), PATIENCE_MINUTES, cure) as (ranks, own), quiet(ranks.rank > 0):
        if open_clip and weights:
            yield Bench.of(open_clip_subject(open_clip, weights, own), out, cache, ranks), paths
        else:
            yield Bench.of(checkpoint_subject(paths[0], own), out, cache, ranks), paths[1:]


def _look_for(paths: list[Path], open_clip: str | None) -> None:
    """Tell what is missing before torch is imported, which takes seconds."""
    if len(paths) < (1 if open_clip else 2):
        raise InputError("give a checkpoint and at least one set" if not open_clip else "give at least one set")
    if not open_clip and not str(paths[0]).startswith("hf:"):
        existing(paths[0], "checkpoint", "give a run folder, a folder inside its checkpoints/, or an export")


def _task(task: str, paths: list[Path], split: str, out: Path | None, cache: Path | None, device: str,
          open_clip: str | None, weights: Path | None, templates: str = "set") -> None:
    _look_for(paths, open_clip)
    from evaluation.evaluate import evaluate, planned

    for folder in paths if open_clip else paths[1:]:
        planned(task, folder, split, templates)  # a wrong set is told before a model is loaded
    with _bench(paths, out, cache, device, open_clip, weights) as (bench, folders):
        _show(bench.out, evaluate(task, bench, folders, split, templates))


def _table(*columns: str, left: int):
    """A plain table whose first `left` columns are text."""
    from rich.table import Table

    table = Table(*columns, box=None)
    for column in table.columns[left:]:
        column.justify = "right"
    return table


def _show(path: Path, rows: list[dict]) -> None:
    """The rows as a small table, and every alarm."""
    from rich.markup import escape

    table = _table("set", "metric", "value", "95 % interval", "chance", "n", left=2)
    for row in rows:
        low, high = row["interval"]
        table.add_row(_named(row), row["metric"], f"{row['value']:.1%}", f"{low:.1%} – {high:.1%}",
                      f"{row['chance']:.1%}", f"{row['n']:,}", style="bold" if row["main_metric"] else "")
    show_table(table)
    for dataset, alarm in dict.fromkeys((row["dataset"], row["alarm"]) for row in rows if row.get("alarm")):
        console.print(f"ALARM {escape(dataset)}: {escape(alarm)}", style="bold red")
    for dataset, note in dict.fromkeys((row["dataset"], (row.get("details") or {}).get("note")) for row in rows):
        if note:
            say(f"note {dataset}: {note}")
    say(f"results {path}")


def _named(row: dict) -> str:
    """The set, and the task where the metric does not tell it."""
    from rich.markup import escape

    return escape(row["dataset"]) + (f" ({row['task']})" if row["task"] in ("probe", "knn", "finetune") else "")


def main() -> None:
    """Entry point of `uniclip-eval`."""
    run(app)

"""`uniclip-eval`: parse, call one function, print. Heavy imports live inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import app as make_app
from pipeline.console import out as console
from pipeline.console import run, say

app = make_app("Zero-shot, retrieval and reports, with intervals and provenance.")
data = make_app("Make evaluation sets in CLIP_benchmark's WebDataset layout.")
app.add_typer(data, name="data")

Checkpoint = Annotated[Path, typer.Argument(help="Run folder, or a folder inside its checkpoints/.")]
Sets = Annotated[list[Path], typer.Argument(help="Set folders in CLIP_benchmark's WebDataset layout.")]
Split = Annotated[str, typer.Option(help="Which split of the sets.")]
Out = Annotated[Path | None, typer.Option(help="Results file; results.jsonl in the run folder when not given.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def retrieval(checkpoint: Checkpoint, sets: Sets, split: Split = "test", out: Out = None,
              device: Device = "auto") -> None:
    """Recall@1, 5, 10 of captions for images and of images for captions.

    Example: `uniclip-eval retrieval runs/scenes-tiny demo/scenes/evalsets/retrieval`
    """
    from evaluation.evaluate import evaluate

    _show(*evaluate("retrieval", checkpoint, sets, split, device, out))


@app.command()
def zeroshot(checkpoint: Checkpoint, sets: Sets, split: Split = "test", out: Out = None,
             device: Device = "auto") -> None:
    """Accuracy of naming the class of an image from prompts alone.

    Example: `uniclip-eval zeroshot runs/scenes-tiny demo/scenes/evalsets/colour demo/scenes/evalsets/shape`
    """
    from evaluation.evaluate import evaluate

    _show(*evaluate("zeroshot", checkpoint, sets, split, device, out))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")],
    results: Annotated[Path | None, typer.Option(help="Results file; RUN/results.jsonl when not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html when not given.")] = None,
) -> None:
    """Write one self-contained HTML page about a run: loss, results with intervals, example retrievals, provenance.

    Example: `uniclip-eval report runs/scenes-tiny`
    """
    from evaluation.report import write

    say(f"report {write(folder, results, out)}")


@data.command("retrieval")
def data_retrieval(
    index: Annotated[Path, typer.Argument(help="Folder of an index made by `uniclip-data index`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the set to write.")],
    split: Split = "test",
) -> None:
    """Turn indexed shards into a retrieval set: every image with all its captions.

    Example: `uniclip-eval data retrieval flickr8k/shards evalsets/flickr8k`
    """
    from evaluation.datasets import from_index

    say(f"{out}/{split}: {from_index(index, out, split):,} images")


def _show(path: Path, rows: list[dict]) -> None:
    """The rows as a small table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("set", "metric", "value", "95 % interval", "chance", "n", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        low, high = row["interval"]
        table.add_row(escape(row["dataset"]), row["metric"], f"{row['value']:.1%}", f"{low:.1%} – {high:.1%}",
                      f"{row['chance']:.1%}", f"{row['n']:,}", style="bold" if row["main_metric"] else "")
    console.print(table)
    say(f"results {path}")


def main() -> None:
    """Entry point of `uniclip-eval`."""
    run(app)

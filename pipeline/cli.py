"""`uniclip-data`: parse, call one function, print. Heavy imports live inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import app as make_app
from pipeline.console import run, say

app = make_app("URL list → WebDataset shards → index, and what can be seen of them.")


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="New folder for train/ and evalsets/.")],
    count: Annotated[int, typer.Option(help="Training scenes.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed draws other scenes.")] = 0,
    held_out: Annotated[int, typer.Option(help="Scenes in each evaluation set.")] = 1_000,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 64,
    format: Annotated[str, typer.Option(help="folder (pictures and captions.tsv) or wds (tars).")] = "folder",
) -> None:
    """Draw the demonstration set: captioned scenes of two objects, and four evaluation sets.

    Example: `uniclip-data scenes demo/scenes --count 20000`
    """
    from pipeline.scenes import make

    make(out, count, seed, held_out, size, format)
    say(f"{out}/train: {count:,} captioned scenes ({format}); "
        f"{out}/evalsets: retrieval, colour, shape, relation, {held_out:,} scenes each")


def main() -> None:
    """Entry point of `uniclip-data`."""
    run(app)

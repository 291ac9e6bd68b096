"""`uniclip-train`: parse, call one function, print. Heavy imports live inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import app as make_app
from pipeline.console import run as run_app
from pipeline.console import say

app = make_app("Train UniCLIP and the systems it is compared with.",
               "uniclip-train run scenes-tiny --set data.index=shards && uniclip-train resume runs/scenes-tiny")

Overrides = Annotated[list[str], typer.Option("--set", metavar="A.B=VALUE", help="Override one value; repeatable.")]


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A preset's name or a TOML file.")],
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Start a run; under torchrun on as many processes as it starts.

    Example: `uniclip-train run scenes-tiny --set data.index=shards --set optim.lr=5e-4`

    Example on 8 GPUs: `torchrun --nproc-per-node 8 --no-python uniclip-train run vit-b32`
    """
    from trainer.config_file import load_config

    resolved = load_config(config, set_)
    from trainer.train import run as run_run

    run_run(resolved)


@app.command()
def resume(
    place: Annotated[str, typer.Argument(metavar="RUN", help="The folder of the run, or the URL of its mirror.")],
    folder: Annotated[Path | None, typer.Option(help="Where a mirror is fetched to: a new folder, or the run's own.")] = None,
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Go on with a run from its latest complete checkpoint, exactly as if it had never stopped.

    It may go on under torchrun on another number of processes: samples, captions and views stay what they were.
    `--set` takes what does not change the result: where files are, what it runs on, how often it writes and evaluates.

    Example: `uniclip-train resume runs/scenes-tiny`

    Example: `uniclip-train resume runs/photos --set run.mirror=s3://bucket/photos --set run.save_every_minutes=5`

    Example on another machine: `uniclip-train resume s3://bucket/photos --folder runs/photos`
    """
    from trainer.train import resume as resume_run

    resume_run(place, folder, set_)


@app.command()
def check(
    config: Annotated[str, typer.Argument(help="A preset's name or a TOML file.")],
    set_: Overrides = [],  # noqa: B006
    dry: Annotated[bool, typer.Option("--dry", help="Only what needs no data and no training, modelled for 8 H200s.")] = False,
    ranks: Annotated[int, typer.Option(min=0, help="Processes that the run will have; one on each GPU unless given.")] = 0,
) -> None:
    """Will this run work? A verdict on each of its parts, with a cure for what is bad; exits 1 when something is.

    Reads, decodes, trains for a minute, and writes nothing.

    Example: `uniclip-train check vit-b32 --dry`
    """
    from trainer.config_file import load_config

    resolved = load_config(config, set_)
    from trainer.check import check as verdicts
    from trainer.verdict import show

    raise typer.Exit(show(verdicts(resolved, dry, ranks)))


@app.command()
def replay(step: Annotated[Path, typer.Argument(metavar="STEP", help="A folder inside RUN/failures/.")]) -> None:
    """Run a step again that was left out because its loss or gradient was not finite, and say what is not.

    Example: `uniclip-train replay runs/photos/failures/000000128000`
    """
    from trainer.failures import replay as replay_step

    replay_step(step)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a folder inside its checkpoints/.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or an older export to replace.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Both towers as ONNX too, checked against torch.")] = False,
) -> None:
    """Write a trained model as a folder that `trainer.load` opens, in the Hugging Face Hub's layout.

    Example: `uniclip-train export runs/photos photos-model --onnx`
    """
    from trainer.export import export as write_export

    for name, difference in write_export(source, folder, onnx).items():
        say(f"{name}: within {difference:.0e} of torch, at every caption length and batch size tried")
    say(f"export {folder}")


@app.command()
def presets() -> None:
    """List the configurations that come with the package.

    Example: `uniclip-train presets`
    """
    from trainer.config_file import presets as known

    for name, path in known().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        say(f"{name:16} {first}")


def main() -> None:
    """Entry point of `uniclip-train`."""
    run_app(app)

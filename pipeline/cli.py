"""`uniclip-data`: parse, call one function, print. Heavy imports live inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_audit import COMMANDS, IndexFolder, say_uncompared
from pipeline.cli_urls import urls
from pipeline.console import app as make_app
from pipeline.console import command_line, err, on_this_machine, run, say

app = make_app("URL list → WebDataset shards → index, and what can be seen of them.",
               "uniclip-data urls table captions.tsv urls.parquet && uniclip-data download urls.parquet shards && "
               "uniclip-data index shards")

Processes = Annotated[int | None, typer.Option(min=1, help="Shards at a time. [one for each core]")]
Threads = Annotated[int, typer.Option(min=1, help="Fetches at a time in each process.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds without a byte; at most 4 × this in all.")]
Retries = Annotated[int, typer.Option(min=0, help="Further tries when a failure may pass.")]
Distributor = Annotated[str, typer.Option(help="processes, ray, spark or inline; all machines must see OUT.")]


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="New folder for train/ and evalsets/.")],
    count: Annotated[int, typer.Option(help="Training scenes.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed draws other scenes.")] = 0,
    held_out: Annotated[int, typer.Option(help="Scenes in each evaluation set, none twice; relation has 96.")] = 1_000,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 64,
    format: Annotated[str, typer.Option(help="folder (pictures and captions.tsv) or wds (tars).")] = "folder",
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of training captions that tell of another scene.")] = 0.0,
) -> None:
    """Draw the demonstration set: captioned scenes of two objects, and four evaluation sets.

    Example: `uniclip-data scenes demo/scenes --count 20000`
    """
    from pipeline.scenes import make

    sets = make(out, count, seed, held_out, size, format, noise)
    say(f"{out}/train: {count:,} captioned scenes ({format}); "
        f"{out}/evalsets: {', '.join(f'{name} {scenes:,}' for name, scenes in sets.items())}")


app.add_typer(urls, name="urls")


@app.command()
def download(
    urls: Annotated[Path, typer.Argument(metavar="URLS.parquet", help="Written by `uniclip-data urls`.")],
    out: Annotated[str, typer.Argument(help="Folder or fsspec URL for the shards; run again to go on after a stop.")],
    image_size: Annotated[int, typer.Option(min=1, help="Longest that the shorter side may be, in pixels.")] = 256,
    shard_size: Annotated[int, typer.Option(min=1, help="URLs in a shard.")] = 1000,
    processes: Processes = None,
    threads: Threads = 32,
    timeout: Timeout = 10,
    retries: Retries = 1,
    allow_address: Annotated[list[str] | None, typer.Option(help="Also fetch from this address or CIDR.")] = None,
    user_agent: Annotated[str | None, typer.Option(help="How to introduce ourselves to servers; name a contact.")] = None,
    format: Annotated[str, typer.Option(help="Images are stored as jpg or webp.")] = "jpg",
    robots: Annotated[bool, typer.Option("--robots", help="Also obey each site's robots.txt.")] = False,
    distributor: Distributor = "processes",
) -> None:
    """Fetch the URLs into WebDataset shards with img2dataset, under rules of what may be fetched.

    Example: `uniclip-data download urls.parquet shards --allow-address 127.0.0.1`
    """
    from pipeline.download import Options
    from pipeline.download import download as run_download
    from pipeline.fetch import USER_AGENT

    options = Options(image_size, shard_size, processes, threads, timeout, retries, tuple(allow_address or ()),
                      user_agent or USER_AGENT, format, robots, distributor)
    for line in run_download(urls, out, options, command_line()).lines():
        say(line)


@app.command()
def retry(
    folder: Annotated[Path, typer.Argument(metavar="DIR", callback=on_this_machine, help="Folder that `download` wrote.")],
    processes: Processes = None,
    threads: Threads = 32,
    timeout: Timeout = 10,
    retries: Retries = 1,
    distributor: Distributor = "processes",
) -> None:
    """Fetch again what failed for a reason that may have passed: timeouts, DNS, 5xx. Into additional shards, DIR/retry1 …

    Never what opted out, was not found, was refused or is forgotten. Run `index` again afterwards.

    Example: `uniclip-data retry shards --timeout 30`
    """
    from pipeline.retry import retry as run_retry

    done = run_retry(folder, {"processes": processes, "threads": threads, "timeout": timeout, "retries": retries,
                              "distributor": distributor}, command_line())
    if done is None:
        say("nothing to retry: no failure may heal")
        return
    where, report = done
    for line in report.lines():
        say(line)
    say(f"{report.stored:>12,}  of {report.rows:,} healed, in {where}")


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(metavar="DIR", callback=on_this_machine, help="Folder with WebDataset tars.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [one for each core]")] = None,
) -> None:
    """Decode every image and write index.arrow and manifest.json; what is unusable goes to quarantine.jsonl.

    Example: `uniclip-data index shards`
    """
    from pipeline.indexing import build

    if (folder / "settings.json").is_file() and not (folder / "download.json").is_file():
        err.print(f"warning: the download into {folder} is not finished: run it again, then index again", style="yellow")
    manifest = build(folder, workers, command_line())
    counts = manifest["counts"]
    for what, count in {"merged (equal sample id)": counts["merged"], **counts["excluded"]}.items():
        if count:
            say(f"{count:>12,}  {what}")
    say(f"{counts['samples']:>12,}  samples in {folder}/index.arrow")
    say_uncompared(manifest, folder)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(callback=on_this_machine,
                                         help="Folder for the merged index; the shards stay where they are.")],
    inputs: Annotated[list[str], typer.Argument(metavar="DIR[=WEIGHT]...", help="Indexes to unite, as shards/cc3m=2.")],
) -> None:
    """Unite indexes into one; equal ids become one sample with all captions. Weights go into its manifest.

    Example: `uniclip-data merge open30m shards/cc3m=2 shards/cc12m shards/yfcc15m`
    """
    from pipeline.merging import merge as run_merge
    from pipeline.merging import parse_input

    united = [parse_input(text) for text in inputs]
    for one in united:
        on_this_machine(one.folder)
    manifest = run_merge(out, united, command_line())
    counts = manifest["counts"]
    for what, count in {"merged (equal sample id)": counts["merged"], **counts["excluded"]}.items():
        if count:
            say(f"{count:>12,}  {what}")
    say(f"{counts['samples']:>12,}  samples in {out}/index.arrow")
    say_uncompared(manifest, out)
    if any(weight != 1 for weight in manifest["weights"].values()):
        say("weights: " + ", ".join(f"{source} {weight:g}" for source, weight in manifest["weights"].items()))


@app.command()
def views(
    index: IndexFolder,
    out: Annotated[Path, typer.Argument(help="Picture to write, .png.")],
    size: Annotated[int, typer.Option(help="Side of a view in pixels.", min=8)] = 224,
    samples: Annotated[int, typer.Option(help="Samples to draw, a row each.", min=1, max=50)] = 4,
    seed: Annotated[int, typer.Option(help="The run's seed.", min=0)] = 0,
    recipe: Annotated[str, typer.Option(help="uniclip, 3weak, 3strong, clip, slip or declip.")] = "uniclip",
    config: Annotated[Path | None, typer.Option(help="A run's config.toml: its size, seed, recipe and ranges.")] = None,
) -> None:
    """Draw samples as training sees them: image with crop boxes, its views, each view's vector as bars.

    Example: `uniclip-data views shards views.png --size 224 --samples 6`

    Example: `uniclip-data views shards views.png --config runs/photos/config.toml`
    """
    from pipeline.index import Index
    from pipeline.picture import Drawing, draw_views

    drawing = Drawing.of_run(config) if config else Drawing.of_recipe(recipe, size, seed)
    count = draw_views(Index.open(index), out, drawing, samples)
    say(f"{out}: {samples} samples, {count} views each")


@app.command()
def replay(
    index: IndexFolder,
    out: Annotated[Path, typer.Argument(help="Picture to write, .png.")],
    sample_id: Annotated[int, typer.Option(help="As logged.")],
    vector: Annotated[str, typer.Option(help="The 11 numbers as logged, a JSON list.")],
    size: Annotated[int, typer.Option(help="Side of the view in pixels.", min=8)] = 224,
) -> None:
    """Make one view again from its original and its vector.

    Example: `uniclip-data replay shards view.png --sample-id 42 --vector '[0, 0, 0.5, 0.5, 0, 0, 0, 0, 0, 1, 0]'`
    """
    from pipeline.index import Index
    from pipeline.picture import draw_replay

    draw_replay(Index.open(index), out, sample_id, vector, size)
    say(f"{out}: sample {sample_id}, {size} px")


@app.command()
def bench(
    index: IndexFolder,
    samples: Annotated[int, typer.Option(help="Samples a round.", min=8)] = 64,
    rounds: Annotated[int, typer.Option(help="Each way in takes turns; medians are shown.", min=1)] = 7,
    size: Annotated[int, typer.Option(help="Side of a view in pixels.", min=8)] = 224,
    recipe: Annotated[str, typer.Option(help="uniclip, 3weak, 3strong, clip, slip or declip.")] = "uniclip",
    out: Annotated[Path | None, typer.Option(help="Also write the figures here, .json.")] = None,
) -> None:
    """Measure the executors, one core each, against torchvision's transforms in SLIP's recipe on the same files.

    Example: `uniclip-data bench shards`
    """
    from pipeline.bench import bench as run_bench
    from pipeline.index import Index

    for line in run_bench(Index.open(index), recipe, size, samples, rounds, out):
        say(line)


for audit in COMMANDS:
    app.command()(audit)


def main() -> None:
    """Entry point of `uniclip-data`."""
    run(app)


if __name__ == "__main__":
    main()

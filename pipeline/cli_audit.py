"""`uniclip-data` on an index: look at it, find its duplicates, take samples out of it. Each is registered by cli.py."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import on_this_machine, say

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", callback=on_this_machine, help="Folder of an index.")]
SkipList = Annotated[Path, typer.Argument(metavar="OUT.parquet", callback=on_this_machine, help="The skip list to write.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes. [one for each core]")]
Distance = Annotated[int, typer.Option(min=0, max=16, help="Of 64 bits of a perceptual hash, at most this many differ.")]
Keep = Annotated[list[str] | None, typer.Option(metavar="CONDITION", help="As 'side>=128'; all must hold.")]


def say_uncompared(manifest: dict, folder: Path) -> None:
    """Whether groups are kept of an earlier `duplicates`, which has not seen every sample."""
    if left := manifest.get("duplicates", {}).get("uncompared"):
        say(f"{left:>12,}  not compared with all others: their duplicate groups may be missing, run "
            f"`uniclip-data duplicates {folder}`")


def stats(index: IndexFolder, json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Survival by source and reason, sizes, shapes, captions, writing systems and languages.

    Example: `uniclip-data stats shards`
    """
    from json import dumps

    from pipeline.index import Index
    from pipeline.stats import lines, statistics

    told = statistics(Index.open(index))
    for line in [dumps(told, indent=2, ensure_ascii=False)] if json else lines(told):
        say(line)


def duplicates(index: IndexFolder, distance: Distance = 4, workers: Workers = None) -> None:
    """Find exact and near duplicates, mirrored ones too, and fill the index's group column; its fingerprint stays.

    Training does not take samples of one group for negatives of each other.

    Example: `uniclip-data duplicates shards`
    """
    from pipeline.duplicates import FINDS
    from pipeline.duplicates import duplicates as find
    from pipeline.index import Index

    found = find(Index.open(index), distance, workers)
    say(f"{found.bytes:>12,}  have a twin with equal bytes")
    say(f"{found.pixels:>12,}  have a twin with equal pixels")
    say(f"{found.look:>12,}  look like another")
    say(f"{found.rows:>12,}  samples in {found.groups:,} groups, the largest of {found.largest:,}")
    say(f"found are, {FINDS}")


def overlap(
    index: IndexFolder, out: SkipList,
    evalset: Annotated[list[Path], typer.Argument(help="Folders of evaluation sets (CLIP_benchmark's layout).")],
    split: Annotated[str, typer.Option(help="Of the evaluation sets.")] = "test",
    distance: Distance = 4, workers: Workers = None,
) -> None:
    """Samples that are images of evaluation sets → a skip list, so that training does not see them.

    Example: `uniclip-data overlap shards skip/overlap.parquet evalsets/flickr8k`
    """
    from pipeline.duplicates import FINDS
    from pipeline.duplicates import overlap as find
    from pipeline.evalsets import open_evalset
    from pipeline.index import Index

    counts = find(Index.open(index), [open_evalset(folder, split) for folder in evalset], out, distance, workers)
    for name, kinds in counts.items():
        say(f"{name}: {kinds['bytes']:,} by bytes, {kinds['pixels']:,} by pixels, {kinds['look']:,} by look")
    say(f"found are, {FINDS}")
    say(f"{out}: train with --set 'data.skip=[\"{out}\"]'")


def filter(index: IndexFolder, out: SkipList, keep: Keep = None) -> None:
    """Samples that do not meet every condition → a skip list; the shards stay as they are.

    Columns: width, height, side, aspect, size, plain, captions, words, characters, script, language, source, shard, key,
    sample_id, group. Operators: >= <= > < = !=.

    Example: `uniclip-data filter shards skip/small.parquet --keep 'side>=128' --keep 'aspect<=3' --keep 'words>=2'`
    """
    from pipeline.console import InputError
    from pipeline.index import Index
    from pipeline.selection import condition, select
    from pipeline.skips import present

    if not keep:
        raise InputError("no condition is given: say for instance --keep 'side>=128'")
    opened = Index.open(index)
    counts = select(opened, out, [condition(text) for text in keep])
    for text, count in counts.items():
        say(f"{count:>12,}  not {text}")
    every = len(present(opened))
    say(f"{every - sum(counts.values()):>12,}  of {every:,} samples stay; {out} lists the others")


def forget(
    folder: Annotated[Path, typer.Argument(metavar="DIR", callback=on_this_machine,
                                            help="Folder of a download or of an index.")],
    what: Annotated[list[str] | None, typer.Argument(help="URLs, sample ids, sha256 sums of image files.")] = None,
    file: Annotated[Path | None, typer.Option("--list", help="The same, one a line, from a file.")] = None,
    reason: Annotated[str, typer.Option(help="Kept with each, for people.")] = "takedown",
    rewrite: Annotated[bool, typer.Option("--rewrite", help="Also blank their bytes in the tars.")] = False,
) -> None:
    """Take samples out for good: never fetched, retried, indexed or merged from here on.

    A URL or an id names one sample. A sha256 names every file of exactly these bytes, from whatever URL: the original as it
    is downloaded, or the image as it is stored in a tar. Copies in another size or encoding are other files: `duplicates` and
    `peek --keep group=…` find them.

    Of a merged index the folders that it was merged from are told, too. `--rewrite` puts zeros where the samples were; the
    tars keep their size, so that other indexes of them stay right.

    Example: `uniclip-data forget shards https://example.com/me.jpg --rewrite`
    """
    from pipeline.takedown import forget as run_forget
    from pipeline.takedown import parse, words_of

    words = [*(what or []), *(words_of(file) if file else [])]
    done = run_forget(folder, parse(words), reason, rewrite)
    say(f"{done.named:>12,}  named: {done.indexed:,} samples of the index, {done.removed:,} were removed from tars; "
        f"{folder}/forgotten.parquet keeps them out")
    if done.unknown:
        say(f"{done.unknown:>12,}  sha256 that no file here has: they will keep out files of exactly these bytes")
    for place in done.untold:
        say(f"{place} is not here or cannot be written: run the same command on it where it can")
    for place in done.emptied:
        say(f"{place} has no sample left: its index is gone, merge without it")


def card(
    index: IndexFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT.md", callback=on_this_machine, help="The card; its picture is OUT.png.")],
    name: Annotated[str, typer.Option(help="What the set is called. [the folder's name]")] = "",
) -> None:
    """Write a data card: counts, survival by reason, licence notes, provenance, a picture.

    Example: `uniclip-data card shards card.md --name "Flickr8k, train"`
    """
    from pipeline.card import write_card
    from pipeline.index import Index

    write_card(Index.open(index), out, name)
    say(f"{out} and {out.with_suffix('.png')}")


def peek(
    index: IndexFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT.html", callback=on_this_machine, help="The page to write.")],
    count: Annotated[int, typer.Option(min=1, max=1000, help="Samples to show.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Another seed shows others.")] = 0,
    keep: Keep = None,
) -> None:
    """A contact sheet: some samples with their captions on one page that opens anywhere.

    Example: `uniclip-data peek shards peek.html --count 100 --keep 'words<=3'`
    """
    from pipeline.index import Index
    from pipeline.peek import peek as write_peek
    from pipeline.selection import condition

    shown = write_peek(Index.open(index), out, count, seed, [condition(text) for text in keep or []])
    say(f"{out}: {shown:,} samples")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", callback=on_this_machine,
                                            help="Folder of a download, an index, a merged index or a run.")],
    workers: Workers = None,
) -> None:
    """Is every file still what was written? Reads all of them once, tars too, and changes nothing; exits 1 when one is not.

    Disks and copies flip bits, also in files whose time of change stays. What a command uses is checked when it is used,
    but for the bytes of the tars; this checks the whole.

    Example: `uniclip-data verify shards`
    """
    from pipeline.console import OK, WORK_FAILED
    from pipeline.verify import verify as run_verify

    done = run_verify(folder, workers)
    columns = [(str(fault.path), fault.found, fault.cure) for fault in done.faults]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    for row in columns:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for cure, paths in done.unsealed.items():
        say(f"{len(paths):>12,}  have no checksum, such as {paths[0]}: {cure}")
    say(f"{len(done.faults):>12,}  of {done.files:,} files ({done.size / 1e9:,.1f} GB) are not what was written")
    raise typer.Exit(WORK_FAILED if done.faults else OK)


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where the set will be.")] = Path(),
    urls: Annotated[int, typer.Option(min=0, help="URLs that are planned, for the disk space.")] = 0,
    image_size: Annotated[int, typer.Option(min=1, help="As download takes it.")] = 256,
    host: Annotated[str, typer.Option(help="A public name to look up, for the DNS.", show_default=False)] = "",
) -> None:
    """Is this machine fit for the work? One table, with a cure for each red line; exits 1 when there is one.

    Example: `uniclip-data doctor /data --urls 30000000 --host example.com`
    """
    from rich.table import Table

    from pipeline.console import OK, WORK_FAILED, InputError, existing, out
    from pipeline.doctor import examine

    if not existing(folder, "the folder", "make it, or give one that is there").is_dir():
        raise InputError(f"{folder} is a file: give the folder where the set will be")
    table, code = Table("", "found", "cure"), OK
    marks = {True: "[green]good", False: "[red]bad", None: "–"}
    for finding in examine(folder, urls, image_size, host):
        table.add_row(f"{marks[finding.good]}[/] {finding.what}" if finding.good is not None else f"– {finding.what}",
                      finding.found, finding.cure)
        code = WORK_FAILED if finding.good is False else code
    out.print(table)
    raise typer.Exit(code)


COMMANDS = (stats, duplicates, overlap, filter, forget, card, peek, verify, doctor)

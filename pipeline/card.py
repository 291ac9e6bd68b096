"""The data card: what the set is, where it comes from, what is missing and why, as Markdown with a picture."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from pipeline.console import InputError
from pipeline.files import replacing
from pipeline.index import Index
from pipeline.markup import markdown
from pipeline.peek import picture_sheet
from pipeline.stats import statistics
from pipeline.survival import percent

# What may be done with each published list and the images behind it. Notes to start from, not legal advice.
LICENCES = {
    "cc3m": "Captions and URLs: free to use for any purpose with attribution to Google (Conceptual Captions' own notice). "
            "Images: belong to their owners, no licence is implied.",
    "cc12m": "Captions and URLs: free to use for any purpose with attribution to Google (Conceptual 12M's own notice). "
             "Images: belong to their owners, no licence is implied.",
    "yfcc15m-v1": "Images: Creative Commons, the licence chosen by each Flickr user; some forbid commercial use or changes.",
    "yfcc15m-v2": "Images: Creative Commons, the licence chosen by each Flickr user; some forbid commercial use or changes.",
}
_UNKNOWN = "Not recorded: find out before the data or a model is passed on."
_environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
_environment.filters["md"] = markdown
_environment.globals["percent"] = percent
_NAMES = {"side": "shorter side, pixels", "aspect": "longer / shorter side", "size": "image file, bytes",
          "captions": "captions of a sample", "words": "words of the longest caption",
          "characters": "characters of the longest caption"}


def _made(index: Index) -> list[str]:
    by = index.manifest.get("created_by", {})
    versions = ", ".join(f"{name} {version}" for name, version in by.get("versions", {}).items())
    lines = [f"indexed with: {by.get('command') or 'unknown'} ({versions})"]
    for one in index.manifest.get("merged_from", []):
        lines.append(f"from {one['folder']}: {one['samples']:,} samples, weight {one['weight']:g}, index "
                     f"{one['fingerprint'][:16]}")
    return [*lines, f"full fingerprint: {index.fingerprint}"]


def write_card(index: Index, out: Path, name: str = "") -> dict[str, Any]:
    """Write OUT and the picture beside it, OUT's name with .png; returns the statistics. Raises InputError."""
    if out.suffix == ".png":
        raise InputError(f"{out} is where the card's picture goes: give a name such as {out.with_suffix('.md')}")
    told = statistics(index)
    picture = out.with_suffix(".png")
    picture_sheet(index, picture)
    with replacing(out) as temporary:
        temporary.write_text(_environment.get_template("card.md.jinja").render(
            name=name or index.folder.resolve().name, s=told, shown=min(24, told["samples"]), picture=picture.name,
            weights=index.manifest.get("weights", {}), licences=LICENCES, unknown=_UNKNOWN, names=_NAMES,
            made=_made(index)), encoding="utf-8")
    return told

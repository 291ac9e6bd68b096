"""What is wrong with an evaluation set, before a number is believed."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from evaluation.catalogue import CATALOGUE, Entry, classnames, identify, official_order
from pipeline.console import existing, track
from pipeline.evalsets import RETRIEVAL, EvalSet, Target, open_evalset, splits_of
from pipeline.images import Undecodable, upright_rgb

NAMED = 3  # examples of a fault that are told


@dataclass
class Report:
    """What a set holds, and what is wrong with it."""

    facts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def check(folder: Path, decode: bool = True) -> Report:
    """Look at every split. Raises InputError when the folder is no set at all."""
    report = Report()
    known = identify(existing(folder, "evaluation set").resolve().name)
    entry = CATALOGUE[known] if known else None
    if entry is None:
        report.facts.append("not in the catalogue: sizes are not checked")
    seen: dict[bytes, tuple[str, str]] = {}
    names: tuple[str, ...] = ()
    for split in splits_of(folder) or ["test"]:
        evalset = open_evalset(folder, split)
        names = evalset.classnames
        _look(evalset, entry, report, seen, decode)
    if entry and known and names:
        _class_order(known, entry, names, report)
    return report


def _look(evalset: EvalSet, entry: Entry | None, report: Report, seen: dict[bytes, tuple[str, str]],
          decode: bool) -> None:
    """One split: its images, labels, captions, and what it shares with splits seen before."""
    targets, broken, shared, twins, torn = [], [], [], [], []
    first: dict[str, Target] = {}
    for key, image, target in track(evalset.examples(), f"checking {evalset.split}"):
        targets.append(target)
        first.setdefault(key, target)
        broken += _undecodable(key, image) if decode else []
        split, other = seen.setdefault(hashlib.sha256(image).digest(), (evalset.split, key))
        if split != evalset.split:
            shared.append(f"{key} is {other} of {split}")
        elif other != key:
            twins.append(f"{key} is {other}")
        if split == evalset.split and isinstance(target, int) and first[other] != target:
            torn.append(f"{other} as {_label(evalset, first[other])}, {key} as {_label(evalset, target)}")
    where = f"{evalset.split}: "
    report.facts.append(f"{where}{len(targets):,} images, {_described(evalset, targets)}")
    for what, found in (("undecodable images", broken), ("images that are in another split too", shared),
                        ("equal images under two labels", torn)):
        if found:
            report.faults.append(f"{where}{len(found):,} {what}: {'; '.join(found[:NAMED])}")
    if twins:
        report.facts.append(f"{where}{len(twins):,} images are twice in it: {'; '.join(twins[:NAMED])}")
    _sizes(evalset, entry, targets, report, where)


def _label(evalset: EvalSet, label: Target) -> str:
    return evalset.classnames[label] if isinstance(label, int) and evalset.classnames else str(label)


def _undecodable(key: str, image: bytes) -> list[str]:
    try:
        upright_rgb(image)
    except Undecodable as error:
        return [f"{key} ({error})"]
    return []


def _described(evalset: EvalSet, targets: list) -> str:
    if evalset.kind == RETRIEVAL:
        counts = Counter(len(captions) for captions in cast(list[list[str]], targets))
        return f"{sum(n * of for n, of in counts.items()):,} captions ({min(counts)} to {max(counts)} an image)"
    return f"{len(set(targets)):,} classes with images, {len(evalset.classnames):,} named"


def _sizes(evalset: EvalSet, entry: Entry | None, targets: list, report: Report, where: str) -> None:
    if evalset.kind != RETRIEVAL and evalset.classnames:
        empty = [evalset.classnames[label] for label in sorted(set(range(len(evalset.classnames))) - set(targets))]
        if empty:
            report.facts.append(f"{where}{len(empty):,} classes have no image: {', '.join(empty[:NAMED])}")
    right = entry.sizes.get({"val": "validation"}.get(evalset.split, evalset.split), ()) if entry else ()
    if right and len(targets) not in right:
        report.faults.append(f"{where}{len(targets):,} images; {entry.title if entry else ''} has "
                             f"{' or '.join(f'{size:,}' for size in right)}")
    if entry and entry.captions and evalset.split == "test":
        captions = sum(map(len, cast(list[list[str]], targets)))
        if captions not in entry.captions:
            report.faults.append(f"{where}{captions:,} captions; {entry.title} has {entry.captions[0]:,}")


def _class_order(known: str, entry: Entry, names: tuple[str, ...], report: Report) -> None:
    """The published order of the names, where the catalogue has it. The alarm of `zeroshot` finds the rest."""
    if len(names) != entry.classes:
        report.faults.append(f"{len(names):,} class names; {entry.title} has {entry.classes:,}")
    official = official_order(names)
    if official and list(names) != official:
        moved = [i for i, (ours, theirs) in enumerate(zip(names, official, strict=True)) if ours != theirs]
        report.faults.append(f"classnames.txt is not in the published order: {len(moved)} of {len(names)} lines differ, "
                             f"line {moved[0] + 1} is {names[moved[0]]!r}, published {official[moved[0]]!r}; right only "
                             "if the labels were numbered that way too: does `uniclip-eval zeroshot` sound its alarm?")
    elif not official and classnames(known) and len(names) == entry.classes:
        report.facts.append("class names differ from the published ones: their order could not be checked")

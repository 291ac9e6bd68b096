"""What a set holds, in numbers: survival by source and reason, sizes, shapes, captions, writing systems, duplicates."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.columns import gathered, languages_of, script_of
from pipeline.download import SETTINGS
from pipeline.index import Index
from pipeline.retry import together
from pipeline.skips import present
from pipeline.survival import FORGOTTEN, percent

_SHARES = (0, 5, 25, 50, 75, 95, 100)
_MEASURED = ("side", "aspect", "size", "captions", "words", "characters")
LANGUAGE_SAMPLES = 2_000  # captions whose script and language are looked at
_TELLING_WORDS = 5  # of a caption, for its language to be guessed


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, and the values below which 0, 5, … 100 % lie."""
    cuts = np.percentile(values, _SHARES, method="nearest") if len(values) else np.zeros(len(_SHARES))
    return {"mean": round(float(np.mean(values)), 2) if len(values) else 0.0,
            **{f"p{share}": round(float(cut), 2) for share, cut in zip(_SHARES, cuts, strict=True)}}


def sample_rows(rows: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Some of these rows, the same ones every time."""
    return np.sort(np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False))


def downloads(index: Index) -> list[Path]:
    """Folders of the downloads that an index comes from; none where its tars came from elsewhere."""
    folders = [index.folder / one["folder"] for one in index.manifest.get("merged_from", [])] or [index.folder]
    return [folder for folder in folders if (folder / SETTINGS).exists()]


def statistics(index: Index) -> dict[str, Any]:
    """Everything `stats` prints and the data card tells of the samples that are not taken down, ready for JSON."""
    rows = present(index)
    columns = {name: values[rows] for name, values in gathered(index, [*_MEASURED, "source", "plain", "group"]).items()}
    groups, sizes = np.unique(columns["group"][columns["group"] >= 0], return_counts=True)
    captions = [index.captions(int(row))[0] for row in sample_rows(rows, LANGUAGE_SAMPLES)]
    excluded = Counter(index.manifest["counts"]["excluded"]) + Counter({FORGOTTEN: len(index) - len(rows)})
    return {
        "samples": len(rows), "shards": len(index.shards), "bytes": int(columns["size"].sum()),
        "fingerprint": index.fingerprint, "merged": index.manifest["counts"]["merged"],
        "excluded": dict(excluded), "sources": dict(Counter(columns["source"].tolist()).most_common()),
        "survival": together(downloads(index)), "spread": {name: spread(columns[name]) for name in _MEASURED},
        "plain": int(columns["plain"].sum()),
        "duplicates": (known := index.manifest.get("duplicates")) and {
            "rows": int(sizes[sizes > 1].sum()), "groups": int((sizes > 1).sum()), "uncompared": known.get("uncompared", 0)},
        "scripts": dict(Counter(map(script_of, captions)).most_common()), "languages": _languages(captions)}


def _languages(captions: list[str]) -> dict[str, int]:
    """Of captions that are long enough to tell."""
    telling = [text for text in captions if len(text.split()) >= _TELLING_WORDS]
    return dict(Counter(languages_of(telling)).most_common()) if importlib.util.find_spec("py3langid") else {}


def lines(told: dict[str, Any]) -> list[str]:
    """For people."""
    found = [f"{told['samples']:>12,}  samples in {told['shards']:,} shards, {told['bytes'] / 1e9:,.2f} GB of images"]
    found += [f"{count:>12,}  from {source or 'no named source'}" for source, count in told["sources"].items()]
    found += [f"{count:>12,}  left out: {reason}" for reason, count in told["excluded"].items()]
    for source, report in told["survival"].items():
        outcomes = {"stored": report["stored"], **report["failed"]}
        found.append(f"survival of {source}: {report['stored']:,} of {report['rows']:,} URLs")
        found += [f"{count:>12,}  {percent(count, report['rows']):>5}%  {what}" for what, count in outcomes.items()]
    shares = list(next(iter(told["spread"].values())))
    found.append(f"{'':12}" + "".join(f"{share:>10}" for share in shares))
    found += [f"{name:12}" + "".join(f"{value:>10,.6g}" for value in values.values())
              for name, values in told["spread"].items()]
    if told["duplicates"]:
        left = "; {uncompared:,} samples not yet compared with all others" if told["duplicates"]["uncompared"] else ""
        found.append(("{rows:>12,}  in {groups:,} duplicate groups" + left).format(**told["duplicates"]))
    for what in ("scripts", "languages"):
        if counted := sum(told[what].values()):
            shown = ", ".join(f"{name} {100 * count / counted:.1f}%" for name, count in list(told[what].items())[:8])
            found.append(f"{what} of {counted:,} captions: {shown}")
    return found

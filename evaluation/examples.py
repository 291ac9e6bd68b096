"""A few queries with what the model found for them, thumbnails inside, kept beside the results for the report.

Some are drawn at random, some are the extremes. N images, T captions, C classes, D embedding, Q queries.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from evaluation.embed import placed
from evaluation.outcomes import Ranks
from evaluation.task import Pairs
from pipeline.console import InputError
from pipeline.evalsets import EvalSet
from pipeline.images import upright_rgb
from pipeline.seals import open_json, write_sealed_json
from trainer.metrics import nearest

QUERIES, CAPTIONS_FOUND, IMAGES_FOUND, EXTREMES = 6, 3, 5, 4
THUMBNAIL = 144  # pixels

Entry = dict[str, Any]


def of_pairs(pairs: Pairs, ranks: Ranks, evalset: EvalSet, seed: int) -> Entry:
    """QUERIES images with their nearest captions and captions with their nearest images, drawn at random; and the
    images whose own captions came first most clearly, and last."""
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(pairs.image_ND))[:QUERIES].tolist()
    texts = rng.permutation(len(pairs.captions))[:QUERIES].tolist()
    rank_N = ranks["image"][0]
    best, worst = _extremes(np.where(rank_N == 0, _cosine_margin(pairs), -rank_N), rank_N == 0)
    queries = [*drawn, *best, *worst]
    texts_found = dict(zip(queries, nearest(pairs.image_ND[queries], pairs.text_TD, CAPTIONS_FOUND).tolist(), strict=True))
    images_found = nearest(pairs.text_TD[texts], pairs.image_ND, IMAGES_FOUND).tolist()
    pictures = _thumbnails(evalset, {*queries, *np.ravel(images_found).tolist()})

    def image_query(i: int) -> Entry:
        return {"picture": pictures[i], **_captions_found(pairs, i, texts_found[i])}

    def text_query(t: int, found: list[int]) -> Entry:
        return {"text": pairs.captions[t],
                "found": [{"picture": pictures[i], "right": bool(pairs.image_of_text_T[t] == i)} for i in found]}

    return {"images": list(map(image_query, drawn)), "captions": list(map(text_query, texts, images_found)),
            "best": list(map(image_query, best)), "worst": list(map(image_query, worst))}


def _captions_found(pairs: Pairs, i: int, found: list[int]) -> Entry:
    owner = pairs.image_of_text_T
    missed = [] if i in owner[found] else [pairs.captions[t] for t in np.flatnonzero(owner == i)]
    return {"own": missed, "found": [{"text": pairs.captions[t], "right": bool(owner[t] == i)} for t in found]}


def _cosine_margin(pairs: Pairs) -> np.ndarray:
    """(N,) how far each image's nearest caption is ahead of its second nearest."""
    pair_N2 = nearest(pairs.image_ND, pairs.text_TD, 2)
    image_ND, text_TD = F.normalize(pairs.image_ND, dim=-1), F.normalize(pairs.text_TD, dim=-1)
    first, last = pair_N2[:, 0], pair_N2[:, -1]
    return ((text_TD[first] - text_TD[last]) * image_ND).sum(dim=-1).numpy()


def _extremes(score_N: np.ndarray, right_N: np.ndarray) -> tuple[list[int], list[int]]:
    """The EXTREMES best of those that are right, the EXTREMES worst of those that are not."""
    order = np.argsort(-score_N, kind="stable")
    return order[right_N[order]][:EXTREMES].tolist(), order[~right_N[order]][::-1][:EXTREMES].tolist()


def of_classes(z_ND: Tensor, class_CD: Tensor, label_N: np.ndarray, said_N: np.ndarray, evalset: EvalSet) -> Entry:
    """The surest right and the surest wrong answers of a classifier."""
    score_N = F.normalize(z_ND, dim=-1)
    others = nearest(z_ND, class_CD, 2)[:, -1]
    right_N = label_N == said_N
    rival_N = np.where(right_N, others, said_N)
    margin_N = ((class_CD[label_N] - class_CD[rival_N]) * score_N).sum(dim=-1).numpy()
    best, worst = _extremes(margin_N, right_N)
    pictures = _thumbnails(evalset, {*best, *worst})

    def answer(i: int) -> Entry:
        return {"picture": pictures[i], "said": evalset.classnames[said_N[i]],
                "label": evalset.classnames[label_N[i]]}

    return {"classes": {"best": list(map(answer, best)), "worst": list(map(answer, worst))}}


def _thumbnails(evalset: EvalSet, wanted: set[int]) -> dict[int, str]:
    """Number of the image in the set → data URI."""
    found = {}
    for number, (_, _, data, _) in enumerate(placed(evalset)):
        if number in wanted:
            image = upright_rgb(data)
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=85, subsampling=0)
            found[number] = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return found


def path_beside(results: Path) -> Path:
    """Where the examples of a results file are."""
    return results.with_suffix(".examples.json")


def read(results: Path) -> list[Entry]:
    """The stored entries, one a set and split; none when the file is absent. Raises InputError."""
    path = path_beside(results)
    text = path.read_bytes() if path.exists() else b"[]"
    try:
        return json.loads(text) if text.startswith(b"[") else open_json(text).get("examples", [])  # a list in older versions
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it, and measure the sets again") from None


def store(results: Path, entry: Entry) -> None:
    """Add an entry; one of the same dataset, split and weights is replaced."""
    same = ("dataset", "split", "weights_sha256")
    others = [old for old in read(results) if any(old.get(name) != entry[name] for name in same)]
    write_sealed_json(path_beside(results), {"examples": [*others, entry]})

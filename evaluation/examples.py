"""A few queries with what the model found for them, thumbnails inside, kept beside the results for the report."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from evaluation.embed import placed
from evaluation.retrieval import Pairs
from pipeline.evalsets import EvalSet
from pipeline.files import write_json
from pipeline.images import upright_rgb

QUERIES, CAPTIONS_FOUND, IMAGES_FOUND = 6, 3, 5
THUMBNAIL = 144  # pixels


def collect(pairs: Pairs, evalset: EvalSet, seed: int) -> dict[str, Any]:
    """QUERIES images with their nearest captions and QUERIES captions with their nearest images, drawn at random."""
    rng = np.random.default_rng(seed)
    images = rng.permutation(len(pairs.image_ND))[:QUERIES]
    texts = rng.permutation(len(pairs.captions))[:QUERIES]
    texts_found = _nearest(pairs.image_ND[images], pairs.text_TD, CAPTIONS_FOUND)
    images_found = _nearest(pairs.text_TD[texts], pairs.image_ND, IMAGES_FOUND)
    pictures = _thumbnails(evalset, {*images.tolist(), *np.ravel(images_found).tolist()})
    owner = pairs.image_of_text_T

    def image_query(i: int, found: list[int]) -> dict[str, Any]:
        missed = [] if i in owner[found] else [pairs.captions[t] for t in np.flatnonzero(owner == i)]
        return {"picture": pictures[i], "own": missed,
                "found": [{"text": pairs.captions[t], "right": bool(owner[t] == i)} for t in found]}

    def text_query(t: int, found: list[int]) -> dict[str, Any]:
        return {"text": pairs.captions[t],
                "found": [{"picture": pictures[i], "right": bool(owner[t] == i)} for i in found]}

    return {"images": list(map(image_query, images.tolist(), texts_found)),
            "captions": list(map(text_query, texts.tolist(), images_found))}


def _nearest(query_QD: torch.Tensor, candidate_CD: torch.Tensor, k: int) -> list[list[int]]:
    scores_QC = F.normalize(query_QD, dim=-1) @ F.normalize(candidate_CD, dim=-1).T
    return scores_QC.topk(min(k, len(candidate_CD)), dim=1).indices.tolist()


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


def read(results: Path) -> list[dict[str, Any]]:
    """The stored entries, one a set and split; none when the file is absent or is no list."""
    path = path_beside(results)
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return stored if isinstance(stored, list) else []


def store(results: Path, entry: dict[str, Any]) -> None:
    """Add an entry; one of the same dataset, split and weights is replaced."""
    same = ("dataset", "split", "weights_sha256")
    others = [old for old in read(results) if any(old.get(name) != entry[name] for name in same)]
    write_json(path_beside(results), [*others, entry])

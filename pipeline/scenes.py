"""The built-in demonstration set: drawn scenes with captions, a training set and evaluation sets of any size.

Whether a combination of objects, relation and background is held out depends on that combination alone, so no
training set holds an evaluation scene, whatever its seed or size. Sample i depends on (seed, i) alone.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pipeline.console import InputError, track
from pipeline.drawing import BACKGROUNDS, COLOURS, OPPOSITE, SHAPES, SIZES, Scene, Thing, draw, jpeg
from pipeline.evalsets import CLASSIFICATION, RETRIEVAL, write_evalset

RELATIONS = tuple(OPPOSITE)
THINGS = tuple(itertools.starmap(Thing, itertools.product(SIZES, COLOURS, SHAPES)))
HELD_OUT_SHARE = 0.1
# These two never meet in training: telling where one stands from the other has to be composed from other scenes.
NEVER_MET = (("red", "circle"), ("blue", "square"))
PER_FOLDER, PER_SHARD, PER_TASK = 1000, 1000, 250
STREAMS = {"train": 0, "order": 1, "retrieval": 2, "colour": 3, "shape": 4, "relation": 5, "noise": 6}


def _rng(seed: int, stream: str, i: int = 0) -> np.random.Generator:
    """Counter-based: streams and samples are disjoint ranges of one counter, the seed is the key."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, STREAMS[stream], i]))


def told_from_first(scene: Scene) -> Scene:
    """The one of a scene's two tellings that stands for the combination: left of, or above."""
    return scene if scene.relation in ("left of", "above") else scene.swapped()


def held_out(scene: Scene) -> bool:
    """Whether the combination is kept for evaluation."""
    if _never_met(scene):
        return True
    digest = hashlib.sha256(told_from_first(scene).caption().encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _never_met(scene: Scene) -> bool:
    return {(scene.first.colour, scene.first.shape), (scene.second.colour, scene.second.shape)} == set(NEVER_MET)


def _any_scene(rng: np.random.Generator) -> Scene:
    first, relation, second, background = (int(rng.integers(n)) for n in
                                           (len(THINGS), len(RELATIONS), len(THINGS), len(BACKGROUNDS)))
    return Scene(THINGS[first], RELATIONS[relation], THINGS[second], tuple(BACKGROUNDS)[background])


def _training_scene(rng: np.random.Generator) -> Scene:
    return next(scene for scene in iter(lambda: _any_scene(rng), None) if not held_out(scene))


def train_sample(i: int, seed: int, size: int, noise: float = 0.0) -> tuple[Scene, bytes]:
    """Training sample i: a combination that is not held out, and its JPEG of size × size.

    noise: probability that another scene is told of than the one drawn; of equal i more noise tells more lies.
    """
    rng, liar = _rng(seed, "train", i), _rng(seed, "noise", i)
    scene = _training_scene(rng)
    other = next(other for other in iter(lambda: _training_scene(liar), None) if other != scene)
    return other if liar.random() < noise else scene, jpeg(draw(scene, size, rng))


@cache
def held_out_scenes() -> tuple[Scene, ...]:
    """Every held-out combination once, in a fixed order."""
    every = itertools.starmap(Scene, itertools.product(THINGS, ("left of", "above"), THINGS, BACKGROUNDS))
    return tuple(filter(held_out, every))


def retrieval_scenes(count: int, seed: int) -> list[Scene]:
    """`count` different held-out combinations, each told from either object. Raises InputError past their number."""
    every = held_out_scenes()
    if count > len(every):
        raise InputError(f"--held-out {count}: only {len(every):,} combinations are held out; ask for fewer")
    rng = _rng(seed, "order")
    chosen = [every[i] for i in rng.permutation(len(every))[:count]]
    return [scene.swapped() if swap else scene for scene, swap in zip(chosen, rng.random(count) < 0.5, strict=True)]


def _colour(scene: Scene) -> str | None:
    return scene.first.colour if scene.first.colour == scene.second.colour else None


def _shape(scene: Scene) -> str | None:
    return scene.first.shape if scene.first.shape == scene.second.shape else None


def _relation(scene: Scene) -> str | None:
    if not _never_met(scene):
        return None
    return (scene if (scene.first.colour, scene.first.shape) == NEVER_MET[0] else scene.swapped()).relation


def _contexts(count: int) -> Iterator[tuple[str, str, str, str]]:
    """(size, relation, size, background) in turn, so that an ensemble of prompts favours none."""
    every = list(itertools.product(SIZES, RELATIONS, SIZES, BACKGROUNDS))
    return (every[i * 29 % len(every)] for i in range(count))  # 29 shares no factor with 96: all are visited


def _colour_prompts() -> list[str]:
    pairs = list(itertools.product(SHAPES, SHAPES))
    return [f"a {size} {{c}} {a} {relation} a {other} {{c}} {b} on a {background} background"
            for (a, b), (size, relation, other, background) in zip(pairs, _contexts(len(pairs)), strict=True)]


def _shape_prompts() -> list[str]:
    pairs = list(itertools.product(COLOURS, COLOURS))
    return [f"a {size} {a} {{c}} {relation} a {other} {b} {{c}} on a {background} background"
            for (a, b), (size, relation, other, background) in zip(pairs, _contexts(len(pairs)), strict=True)]


def _relation_prompts() -> list[str]:
    (colour, shape), (other_colour, other_shape) = NEVER_MET
    return [f"a {a} {colour} {shape} {{c}} a {b} {other_colour} {other_shape} on a {background} background"
            for a, b, background in itertools.product(SIZES, SIZES, BACKGROUNDS)]


# What the class of a scene is (None: the scene is not in the set), the classes, the prompts: whole captions, since
# that is all the text a model of scenes has read.
LABELLED = {
    "colour": (_colour, tuple(COLOURS), _colour_prompts),    # both objects have it
    "shape": (_shape, tuple(SHAPES), _shape_prompts),        # both objects have it
    "relation": (_relation, RELATIONS, _relation_prompts),   # of the red circle to the blue square
}


def labelled_scenes(name: str, count: int, seed: int) -> list[tuple[Scene, int]]:
    """`count` different held-out scenes of a labelled set, classes in turn, or as many as the smallest class has of each.

    None comes twice: of 1,000 pictures of 96 combinations the intervals would be those of 1,000 independent ones.
    """
    label_of, classes, _ = LABELLED[name]
    by_class: dict[str, list[Scene]] = {label: [] for label in classes}
    every = held_out_scenes()
    for i in _rng(seed, "order", 1).permutation(len(every)):
        label = label_of(every[i])
        if label is not None:
            by_class[label].append(every[i])
    turns = (divmod(k, len(classes)) for k in range(min(count, len(classes) * min(map(len, by_class.values())))))
    return [(by_class[classes[label]][turn], label) for turn, label in turns]


def _write_evalsets(folder: Path, count: int, seed: int, size: int) -> dict[str, int]:
    """→ the number of scenes in each set."""
    pairs = ((jpeg(draw(scene, size, _rng(seed, "retrieval", i))), [scene.caption()])
             for i, scene in enumerate(retrieval_scenes(count, seed)))
    written = {"retrieval": write_evalset(folder / "retrieval", "test", pairs, RETRIEVAL)}
    for name, (_, classes, prompts) in LABELLED.items():
        examples = ((jpeg(draw(scene, size, _rng(seed, name, i))), label)
                    for i, (scene, label) in enumerate(labelled_scenes(name, count, seed)))
        written[name] = write_evalset(folder / name, "test", examples, CLASSIFICATION, classes, prompts())
    return written


def _write_folder(folder: Path, samples: Iterable[tuple[Scene, bytes]]) -> None:
    """images/NNN/NNNNNN.jpg and, last, captions.tsv: the table a user would have."""
    rows = ["image\tcaption\n"]
    for i, (scene, image) in enumerate(samples):
        path = f"images/{i // PER_FOLDER:03d}/{i:06d}.jpg"
        if i % PER_FOLDER == 0:
            (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(image)
        rows.append(f"{path}\t{scene.caption()}\n")
    (folder / "captions.tsv").write_text("".join(rows), encoding="utf-8")


def _write_wds(folder: Path, samples: Iterable[tuple[Scene, bytes]]) -> None:
    """NNNNN.tar with jpg, txt and json, mtime 0 so that equal sets have equal bytes."""
    from webdataset import ShardWriter

    pattern = str(folder.resolve()).replace("%", "%%") + "/%05d.tar"
    with ShardWriter(pattern, maxcount=PER_SHARD, verbose=0, mtime=0) as sink:
        for i, (scene, image) in enumerate(samples):
            facts = json.dumps({"caption": scene.caption(), **asdict(scene)}).encode()
            sink.write({"__key__": f"{i:09d}", "jpg": image, "txt": scene.caption().encode(), "json": facts})


FORMATS = {"folder": _write_folder, "wds": _write_wds}


def _drawn(count: int, seed: int, size: int, noise: float) -> Iterator[tuple[Scene, bytes]]:
    """Training samples in order, drawn on every core when there are enough of them to pay for starting processes."""
    one = partial(train_sample, seed=seed, size=size, noise=noise)
    if count < 8 * PER_TASK:
        yield from map(one, range(count))
        return
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(one, range(count), chunksize=PER_TASK)


def make(out: Path, count: int, seed: int, held_out_count: int, size: int, layout: str, noise: float = 0.0) -> dict[str, int]:
    """Write OUT/train and OUT/evalsets → scenes in each evaluation set; OUT appears under its name only when complete.

    Raises InputError for a folder that holds something, an unknown layout, or numbers out of range.
    """
    out = out.resolve()
    _check(out, count, seed, held_out_count, size, layout)
    if not 0 <= noise <= 1:
        raise InputError(f"--noise {noise}: give a share, 0 … 1")
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    (partial_out / "train").mkdir(parents=True)
    written = _write_evalsets(partial_out / "evalsets", held_out_count, seed, size)
    FORMATS[layout](partial_out / "train", track(_drawn(count, seed, size, noise), "drawing scenes", count))
    partial_out.rename(out)
    return written


def _check(out: Path, count: int, seed: int, held_out_count: int, size: int, layout: str) -> None:
    if layout not in FORMATS:
        raise InputError(f"--format {layout}: choose one of {', '.join(FORMATS)}")
    for name, value, least in (("--count", count, 1), ("--held-out", held_out_count, 1), ("--size", size, 16),
                               ("--seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} {value}: at least {least} is needed")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there and not empty: choose another folder or remove it")

"""Scenes: pure functions of (seed, i), nothing held out in training, pictures that show what captions say."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.drawing import COLOURS, Scene, Thing, draw
from pipeline.evalsets import open_evalset
from pipeline.images import upright_rgb
from pipeline.scenes import (
    _rng,
    held_out,
    held_out_scenes,
    labelled_scenes,
    make,
    retrieval_scenes,
    told_from_first,
    train_sample,
)


def rows(out: Path) -> list[list[str]]:
    return [line.split("\t") for line in (out / "train/captions.tsv").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "demo"
    make(out, count=1100, seed=3, held_out_count=64, size=32, layout="folder")
    return out


def test_a_sample_depends_on_seed_and_number_only(made: Path) -> None:
    assert rows(made)[0] == ["image", "caption"] and len(rows(made)) == 1101
    for i in (0, 1, 999, 1000, 1099):
        path, caption = rows(made)[1 + i]
        scene, data = train_sample(i, seed=3, size=32)
        assert path == f"images/{i // 1000:03d}/{i:06d}.jpg"
        assert (caption, (made / "train" / path).read_bytes()) == (scene.caption(), data)
    assert train_sample(0, seed=4, size=32) != train_sample(0, seed=3, size=32)


def test_processes_change_nothing(tmp_path: Path, made: Path) -> None:
    make(tmp_path / "more", count=2000, seed=3, held_out_count=64, size=32, layout="folder")  # enough for the pool
    assert rows(tmp_path / "more")[:1101] == rows(made)
    assert all((tmp_path / "more/train" / path).read_bytes() == (made / "train" / path).read_bytes()
               for path, _ in rows(made)[1::100])


def test_no_held_out_combination_is_trained_on_under_either_telling(made: Path) -> None:
    kept = {caption for scene in held_out_scenes() for caption in (scene.caption(), scene.swapped().caption())}
    assert not kept & {caption for _, caption in rows(made)}
    assert 0.08 < len(held_out_scenes()) / (96 * 96 * 2 * 6) < 0.12
    scene = held_out_scenes()[0]
    assert held_out(scene) and held_out(scene.swapped()) and told_from_first(scene.swapped()) == scene


def test_retrieval_captions_name_different_pictures() -> None:
    scenes = retrieval_scenes(5000, seed=0)
    assert len({told_from_first(scene).caption() for scene in scenes}) == 5000
    assert {scene.relation for scene in scenes} == {"left of", "right of", "above", "below"}
    assert all(map(held_out, scenes))


@pytest.mark.parametrize("name", ["colour", "shape", "relation"])
def test_labels_are_balanced_unambiguous_and_what_the_prompt_says(made: Path, name: str) -> None:
    evalset = open_evalset(made / "evalsets" / name)
    drawn = labelled_scenes(name, 64, seed=3)
    assert [label for _, label in drawn] == [label for _, _, label in evalset.examples()]
    assert max(Counter(label for _, label in drawn).values()) <= -(-64 // len(evalset.classnames))
    words = {"small", "large", "on", "a", "background"}
    for scene, label in drawn:
        tellings = {scene.caption(), scene.swapped().caption()}
        shared = Counter(scene.caption().split())
        assert held_out(scene)
        if name == "relation":
            prompts = {t.replace("{c}", evalset.classnames[label]) for t in evalset.templates}
            wrong = {t.replace("{c}", c) for t in evalset.templates for i, c in enumerate(evalset.classnames)
                     if i != label}
            assert tellings & prompts and not tellings & wrong
        else:
            assert shared[evalset.classnames[label]] == 2 and evalset.classnames[label] not in words


def test_no_scene_is_twice_in_a_set_however_many_are_asked_for() -> None:
    for name, least in (("colour", 1000), ("shape", 1000), ("relation", 96)):
        drawn = [told_from_first(scene).caption() for scene, _ in labelled_scenes(name, 1000, seed=0)]
        assert len(set(drawn)) == len(drawn) == least


def test_every_prompt_is_a_caption_of_the_grammar(made: Path) -> None:
    vocabulary = {word for _, caption in rows(made)[1:] for word in caption.split()}
    for name in ("colour", "shape", "relation"):
        evalset = open_evalset(made / "evalsets" / name)
        assert len(set(evalset.templates)) == len(evalset.templates) >= 24
        prompts = [t.replace("{c}", c) for t in evalset.templates for c in evalset.classnames]
        assert {word for prompt in prompts for word in prompt.split()} <= vocabulary


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_the_picture_shows_the_colours_at_the_places_the_caption_says(relation: str) -> None:
    scene = Scene(Thing("large", "red", "circle"), relation, Thing("small", "blue", "square"), "white")
    for i in range(20):
        pixels = np.asarray(draw(scene, 48, _rng(0, "train", i))).astype(int)
        places = []
        for colour, least in (("red", 120), ("blue", 50)):
            near = np.abs(pixels - COLOURS[colour]).max(axis=2) < 40
            assert near.sum() > least
            places.append(np.argwhere(near).mean(axis=0)[::-1])
        (x, y), (other_x, other_y) = places
        assert {"left of": x < other_x - 15, "right of": x > other_x + 15,
                "above": y < other_y - 15, "below": y > other_y + 15}[relation]
        assert upright_rgb(train_sample(i, 0, 48)[1]).size == (48, 48)


def test_tars_hold_the_same_scenes_as_the_folder(made: Path, tmp_path: Path) -> None:
    import webdataset

    make(tmp_path / "demo", count=1100, seed=3, held_out_count=64, size=32, layout="wds")
    tars = sorted(map(str, (tmp_path / "demo/train").glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(tars) == 2 and [s["txt"].decode() for s in samples] == [caption for _, caption in rows(made)[1:]]
    assert samples[7]["jpg"] == (made / "train/images/000/000007.jpg").read_bytes()
    assert json.loads(samples[7]["json"])["caption"] == samples[7]["txt"].decode()
    for name in ("retrieval", "colour", "shape", "relation"):
        assert (open_evalset(tmp_path / "demo/evalsets" / name).manifest_sha256
                == open_evalset(made / "evalsets" / name).manifest_sha256)


def test_wrong_arguments_end_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "full/x").mkdir(parents=True)
    for out, arguments, message in (
            (tmp_path / "full", {}, "not empty"), (tmp_path / "a", {"layout": "zip"}, "folder, wds"),
            (tmp_path / "a", {"count": 0}, "--count 0"), (tmp_path / "a", {"held_out_count": 10**6}, "are held out")):
        settings = {"count": 1, "seed": 0, "held_out_count": 1, "size": 32, "layout": "folder"} | arguments
        with pytest.raises(InputError, match=message):
            make(out, **settings)
    script = "from pipeline.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "scenes", str(tmp_path / "full")], capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_noise_tells_of_another_scene_and_leaves_the_rest_as_it_was() -> None:
    clean, some, more = ([train_sample(i, 0, 16, noise) for i in range(400)] for noise in (0.0, 0.2, 0.5))
    assert all(a[1] == b[1] == c[1] for a, b, c in zip(clean, some, more, strict=True)), "the pictures are the same"
    lies = [[i for i in range(400) if told[i][0] != clean[i][0]] for told in (some, more)]
    assert set(lies[0]) < set(lies[1]) and abs(len(lies[0]) - 80) < 30 and abs(len(lies[1]) - 200) < 35
    assert not any(held_out(scene) for scene, _ in more)

"""Cursor in, batches out: equal however they are asked for, and honest about what cannot be read."""

import dataclasses
import json
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import encoded, picture
from shards import write_set

from pipeline import recipe as module
from pipeline.console import InputError, WorkFailed
from pipeline.index import Index
from pipeline.ledger import Ledger
from pipeline.loader import Indexed, Loader, group_ids, slice_of
from pipeline.reader import Place
from pipeline.recipe import Cursor, Recipe, make_executor
from pipeline.sampling import STRONG, WEAK
from pipeline.stream import Stream
from pipeline.text import CaptionTokenizer

RECIPE = Recipe((WEAK, STRONG), 32, "dali", 1)


@pytest.fixture(scope="module")
def index(scenes):
    return Index.open(scenes / "train")


@pytest.fixture(scope="module")
def tokenizer(index):
    return CaptionTokenizer.train([c for row in range(len(index)) for c in index.captions(row)], 400, 24)


def loader(index, tokenizer, samples_seen=0, batch=16, recipe=RECIPE, **options) -> Loader:
    cursor = Cursor(5, samples_seen, index.fingerprint, recipe.fingerprint())
    return Loader(index, tokenizer, recipe, cursor, batch, **options)


def collect(stream: Loader, samples: int) -> dict[str, torch.Tensor]:
    """The next `samples` samples of a loader, batches joined."""
    iterator, batches = iter(stream), []
    while sum(len(b.valid) for b in batches) < samples:
        batches.append(next(iterator)[0])
    iterator.close()
    joined = {name: torch.cat([getattr(b, name) for b in batches])
              for name in ("vectors", "tokens", "sample_id", "valid")}
    return {**joined, "view": torch.cat([b.views[-1] for b in batches])}


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_any_batch_size_and_restart_gives_the_same_stream(index, tokenizer):
    whole = collect(loader(index, tokenizer, batch=48), 240)
    assert equal(whole, collect(loader(index, tokenizer, batch=16), 240))
    tail = collect(loader(index, tokenizer, samples_seen=144, batch=16), 96)
    assert equal({name: t[144:] for name, t in whole.items()}, tail)
    assert sorted(whole["sample_id"][:120].tolist()) == sorted(whole["sample_id"][120:].tolist())
    assert len(set(whole["sample_id"][:120].tolist())) == 120


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_see_the_global_batch(index, tokenizer, world):
    alone = next(iter(loader(index, tokenizer, batch=14)))[0]
    parts = [next(iter(loader(index, tokenizer, batch=14, rank=r, world=world)))[0] for r in range(world)]
    for name in ("vectors", "tokens", "sample_id", "group_id"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(alone, name)), name
    assert torch.equal(torch.cat([p.views[1] for p in parts]), alone.views[1])


def test_slices_cover_every_batch():
    for world in range(1, 9):
        for batch in range(1, 30):
            parts = [slice_of(r, world, batch) for r in range(world)]
            assert [x for p in parts for x in range(batch)[p]] == list(range(batch))
            assert max(p.stop - p.start for p in parts) <= -(-batch // world)


def test_both_executors_give_the_same_samples_and_nearly_the_same_pixels(index, tokenizer):
    dali, pillow = (collect(loader(index, tokenizer, recipe=dataclasses.replace(RECIPE, executor=name)), 32)
                    for name in ("dali", "pillow"))
    difference = (dali.pop("view") - pillow.pop("view")).abs()
    assert equal(dali, pillow)
    assert difference.mean() < 0.01


def test_group_ids_are_connected_components():
    ids = np.array([1, 2, 3, 4, 5, 1, 6])
    groups = np.array([-1, 7, -1, 7, -1, -1, -1])
    captions = ["a", "b", "c", "d", "d", "e", "f"]
    assert group_ids(ids, groups, captions).tolist() == [0, 1, 2, 1, 1, 0, 6]


FORMS = ("A Red Dog", "a red dog", "a  red\tdog ", "a red d&#111;g", "Ａ red dog")


@pytest.mark.parametrize("road", ["index", "stream"])
def test_equal_tokens_are_one_group_on_all_ranks(road, tmp_path):
    """Two tars, so that ranks that read tars of their own meet the forms of one caption apart."""
    captions = [*FORMS, "café", "cafe\u0301", "A RED CAT"] * 2
    folder = write_set(tmp_path, [(encoded(picture(n)), {"caption": c}) for n, c in enumerate(captions)], 8)
    data = (Indexed.open(folder, {}, np.empty(0, np.int64), Place()) if road == "index"
            else Stream.open(f"{folder}/0000{{0,1}}.tar", np.empty(0, np.int64)))
    cursor, found = Cursor(5, 0, data.fingerprint, RECIPE.fingerprint()), {}
    for world in (1, 2):
        parts = [next(iter(data.loader(CaptionTokenizer.clip(), RECIPE, cursor, 16, rank=rank, world=world)))[0]
                 for rank in range(world)]
        ids, tokens = (torch.cat([getattr(part, name) for part in parts]) for name in ("group_id", "tokens"))
        found[world] = ids.tolist()
        texts = [tuple(row) for row in tokens[:, 0].tolist()]
        assert len(set(zip(ids.tolist(), texts, strict=True))) == len(set(ids.tolist())) == len(set(texts)) == 3
    assert road == "stream" or found[1] == found[2]


def test_the_batch_says_what_was_drawn(index, tokenizer):
    batch, cursor = next(iter(loader(index, tokenizer)))
    assert cursor.samples_seen == 16
    assert [v.shape for v in batch.views] == [(16, 3, 32, 32)] * 2
    assert batch.vectors.shape == (16, 2, 11)
    assert batch.tokens.shape == (16, 1, 24)
    assert batch.valid.all()
    row = int(np.flatnonzero(index.columns(np.arange(len(index)))["sample_id"] == int(batch.sample_id[3]))[0])
    assert np.array_equal(tokenizer(index.captions(row))[0], batch.tokens[3, 0].numpy())


@pytest.mark.parametrize("field, value", [("seed", 6), ("index", "other"), ("data", "other"), ("schema", 0)])
def test_a_stream_on_other_data_is_refused_by_field(field, value):
    saved = Cursor(5, 100, "index", "data")
    with pytest.raises(InputError, match=field):
        dataclasses.replace(saved, **{field: value}).refuse_other(saved)
    dataclasses.replace(saved, samples_seen=0).refuse_other(saved)


@pytest.fixture
def broken(index, tmp_path):
    """A copy of the set in which six images are damaged after indexing: two cut short, two with noise inside, two blank."""
    folder = tmp_path / "broken"
    shutil.copytree(index.folder, folder)
    columns = index.columns(np.arange(len(index)))
    for n, row in enumerate(range(3, 63, 10)):
        shard = folder / index.shards[int(columns["shard"][row])]
        data = bytearray(shard.read_bytes())
        at, size = int(columns["offset"][row]), int(columns["size"][row])
        if n % 3 == 0:
            data[at + size // 2 : at + size] = bytes(size - size // 2)
        elif n % 3 == 1:
            data[at : at + 200] = bytes(range(200))
        else:
            data[at : at + size] = b"\0" * size
        shard.write_bytes(data)
    return Index.open(folder)


@pytest.mark.parametrize("executor", ["dali", "pillow"])
def test_bad_images_are_invalid_counted_and_named(broken, tokenizer, tmp_path, executor):
    path = tmp_path / "bad.jsonl"
    ledger = Ledger(path, budget=0.2)
    recipe = dataclasses.replace(RECIPE, executor=executor)
    seen = collect(loader(broken, tokenizer, batch=40, recipe=recipe, ledger=ledger), 120)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert int((~seen["valid"]).sum()) == 6
    assert len(lines) == 6
    assert all({"samples", "shard", "key", "reason"} <= set(line) for line in lines)


def test_too_many_bad_images_end_the_run_with_a_clear_line(broken, tokenizer, tmp_path):
    stream = loader(broken, tokenizer, batch=40, ledger=Ledger(tmp_path / "bad.jsonl", budget=0.01))
    with pytest.raises(WorkFailed, match=r"could not be decoded, more than the budget of 1\.00%"):
        collect(stream, 400)


def test_a_vanished_shard_is_a_bad_sample_not_a_crash(index, tokenizer, tmp_path):
    folder = tmp_path / "gone"
    shutil.copytree(index.folder, folder)
    (folder / index.shards[0]).unlink()
    gone = Index.open(folder)
    batch = next(iter(loader(gone, tokenizer, batch=60, ledger=Ledger(None, budget=1.0))))[0]
    assert not batch.valid.all()


def test_dali_is_the_default_and_missing_dali_on_cuda_is_an_error(monkeypatch):
    assert type(make_executor(Recipe((WEAK,), 32), "cpu")).__name__ == "DaliExecutor"
    assert type(make_executor(Recipe((WEAK,), 32, "pillow"), "cpu")).__name__ == "PillowExecutor"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert type(make_executor(Recipe((WEAK,), 32), "cpu")).__name__ == "PillowExecutor"
    for recipe, device in ((Recipe((WEAK,), 32), "cuda"), (Recipe((WEAK,), 32, "dali"), "cpu")):
        with pytest.raises(InputError, match="pip install nvidia-dali"):
            make_executor(recipe, device)


def test_a_closed_loader_leaves_no_thread(index, tokenizer):
    import threading

    before = threading.active_count()
    iterator = iter(loader(index, tokenizer, recipe=dataclasses.replace(RECIPE, executor="pillow")))
    next(iterator)
    iterator.close()
    time.sleep(0.2)
    assert threading.active_count() <= before

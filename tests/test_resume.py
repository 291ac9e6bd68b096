"""The stream is one stream: whatever the executor, batch size, threads, ranks and restart points, to the bit."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import encoded, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.console import InputError
from pipeline.execution import Guarded
from pipeline.files import sha256_of
from pipeline.images import upright_rgb
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.ledger import Ledger
from pipeline.loader import Indexed, Loader
from pipeline.merging import Input, merge
from pipeline.picture import draw_replay
from pipeline.plan import make_plan, read_skip_lists
from pipeline.reader import Place
from pipeline.recipe import Cursor, Recipe
from pipeline.replay import normalised, view
from pipeline.sampling import KINDS, RECIPES, draw_captions, sample_vectors
from pipeline.schema import sample_id_of
from pipeline.seals import open_json
from pipeline.skips import FORGOTTEN_NAME, write_skips
from pipeline.stream import Stream
from pipeline.survival import FORGOTTEN
from pipeline.takedown import forget, parse

UNICLIP = tuple(KINDS[name] for name in RECIPES["uniclip"])
WEIGHTS = {"flickr": 2.5, "cc": 0.6, "coco": 1.0}


class Nothing:
    """An executor that only says what it was told."""

    def __call__(self, encoded, vectors, ids):
        return [torch.zeros(len(encoded), 3, 1, 1)] * vectors.shape[1], torch.from_numpy(vectors), torch.from_numpy(ids)

    def close(self) -> None: ...


def tokens(captions: list[str]) -> np.ndarray:
    """The number at the end of each caption; -2 for an empty one."""
    return np.array([[int(caption.rpartition(" ")[2].replace(FORGOTTEN, "-1") or -2)] for caption in captions])


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def url_of(number: int) -> str:
    return f"http://host/{number}.jpg"


NUMBER = {sample_id_of(url_of(number)): number for number in range(42)}
ID = {number: sample_id for sample_id, number in NUMBER.items()}


def numbers(sample_id: torch.Tensor) -> np.ndarray:
    """Which of the 42 samples."""
    return np.array([NUMBER[one] for one in sample_id.tolist()])


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    """Five shards of 5 to 13 samples from three sources; 42 samples with one to three captions."""
    folder, number = tmp_path_factory.mktemp("sources"), 0
    for shard, count in enumerate((5, 13, 8, 7, 9)):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for _ in range(count):
                texts = [f"caption {10 * number + n}" for n in range(1 + number % 3)]
                told = {"captions": texts, "source": sorted(WEIGHTS)[number % 3], "url": url_of(number)}
                add(tar, f"{number:05d}.jpg", encoded(picture(number, 40 + number, 50)))
                add(tar, f"{number:05d}.json", json.dumps(told).encode())
                number += 1
    build(folder, 1)
    return Index.open(folder)


def loader(index: Index, batch: int, seen: int = 0, rank: int = 0, world: int = 1, weights=None, executor=None,
           skip=(), **options) -> Loader:
    recipe = Recipe(UNICLIP, 8, executor or "pillow", 1)
    cursor = Cursor(3, seen, index.fingerprint, recipe.fingerprint())
    made = Loader(index, tokens, recipe, cursor, batch, rank=rank, world=world, ledger=Ledger(None, 1.0),
                  plan=make_plan(index, weights, np.array(sorted(skip), np.int64)), **options)
    if executor is None:
        made._executor.close()
        made._executor = Guarded(Nothing())
    return made


FIELDS = ("sample_id", "tokens", "vectors")


def run(index: Index, legs: list[tuple[int, int]], batch: int, start: int = 0, **options) -> dict[str, torch.Tensor]:
    """The concatenated stream of runs of (ranks, batches), each going on where the last one stopped."""
    seen, parts = start, []
    for world, batches in legs:
        streams = [iter(loader(index, batch, seen, rank, world, **options)) for rank in range(world)]
        for _ in range(batches):
            ranks = [next(stream) for stream in streams]
            parts.append({name: torch.cat([getattr(b, name) for b, _ in ranks]) for name in FIELDS})
            groups = torch.cat([b.group_id for b, _ in ranks])
            assert torch.equal(groups, groups[groups]), "a group is not named by its first position in the global batch"
            (seen,) = {cursor.samples_seen for _, cursor in ranks}
        for stream in streams:
            stream.close()
    return {name: torch.cat([part[name] for part in parts]) for name in FIELDS}


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in FIELDS)


@pytest.fixture(scope="module")
def undisturbed(index):
    """400 samples, about 6 epochs, on one rank in batches of 50."""
    return {"even": run(index, [(1, 8)], 50), "weighted": run(index, [(1, 8)], 50, weights=WEIGHTS)}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["even", "weighted"]), st.integers(5, 23), st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4)), min_size=2, max_size=4), st.integers(0, 40))
def test_ranks_come_and_go_and_the_stream_stays(index, undisturbed, kind, batch, legs, start):
    weights = WEIGHTS if kind == "weighted" else None
    joined = run(index, legs, batch, start, weights=weights)
    end = start + len(joined["tokens"])
    assert end == start + batch * sum(batches for _, batches in legs)
    assert same(joined, {name: column[start:end] for name, column in undisturbed[kind].items()})


def test_one_two_four_three_ranks_and_a_batch_none_of_them_divides(index, undisturbed):
    legs = [(1, 3), (2, 4), (4, 5), (3, 4)]
    assert same(run(index, legs, 23, weights=WEIGHTS),
                {name: column[:368] for name, column in undisturbed["weighted"].items()})


def test_an_epoch_holds_the_weights_with_different_views(index):
    plan = make_plan(index, WEIGHTS)
    assert len(plan) == 14 * 2 + 7 + round(14 * 0.6) + 14
    stream = run(index, [(1, 1)], len(plan), weights=WEIGHTS)
    times = np.bincount(numbers(stream["sample_id"]), minlength=42)
    source = np.arange(42) % 3
    for number, name in enumerate(sorted(WEIGHTS)):
        assert np.isin(times[source == number] - int(WEIGHTS[name]), (0, 1)).all()
    views = {vector.numpy().tobytes() for vector in stream["vectors"][:, 1]}
    assert len(views) == len(plan), "a repeat has the view of another"


def test_ten_thousand_vectors_are_bit_equal_however_they_are_asked_for(index):
    weights = {"cc": 2.0, "coco": 2.0, "flickr": 2.0}
    epochs = 40
    samples = epochs * 2 * len(index)  # × 3 views = 10,080 tuples of seed, epoch, repeat, sample, view
    sizes = {int(i): (int(w), int(h)) for i, w, h in zip(*(index.columns(np.arange(len(index)))[n] for n in (
        "sample_id", "width", "height")), strict=True)}
    seen: dict[tuple[int, int], int] = {}
    whole = run(index, [(1, -(-samples // 64))], 64, weights=weights)
    for n in range(samples):
        sample, epoch = int(whole["sample_id"][n]), n // (2 * len(index))
        seen[sample, epoch] = seen.get((sample, epoch), -1) + 1
    assert set(seen.values()) == {1}
    expected = {(sample, epoch, repeat): sample_vectors(3, epoch, repeat, np.array([sample]), np.array([sizes[sample]]),
                                                        UNICLIP)[0].tobytes()
                for sample, epoch in seen for repeat in (0, 1)}
    for n in range(samples):  # which of the two repeats came first is the shuffle's choice
        sample, epoch = int(whole["sample_id"][n]), n // (2 * len(index))
        assert whole["vectors"][n].numpy().tobytes() in {expected[sample, epoch, 0], expected[sample, epoch, 1]}
    assert len({v.tobytes() for v in whole["vectors"][:samples].numpy()}) == samples
    ways = [([(1, 60)], 1, {}), ([(3, 60)], 7, {}), ([(2, 20), (4, 20), (1, 12)], 64, {}),
            ([(1, 6)], 64, {"executor": "dali"}), ([(2, 10)], 7, {"executor": "pillow"})]
    for legs, batch, options in ways:
        part = run(index, legs, batch, weights=weights, **options)
        assert same(part, {name: column[: len(part["tokens"])] for name, column in whole.items()}), (legs, batch)


def test_captions_are_those_drawn(index):
    stream = run(index, [(1, 1)], 42)
    number = numbers(stream["sample_id"])
    drawn = draw_captions(3, 0, 0, stream["sample_id"].numpy(), 1 + number % 3)
    assert np.array_equal(stream["tokens"].ravel().numpy(), 10 * number + drawn)


def test_skipped_rows_leave_and_change_the_hash(index, tmp_path):
    gone = [ID[3], ID[4], ID[41], 5]
    pq.write_table(pa.table({"sample_id": gone, "reason": [""] * 4}), tmp_path / "skip.parquet")
    pq.write_table(pa.table({"sample_id": gone[:1]}), tmp_path / "more.parquet")
    ids = read_skip_lists((tmp_path / "skip.parquet", tmp_path / "more.parquet"))
    assert ids.tolist() == sorted(gone)
    for weights, length in ((None, 39), (WEIGHTS, 54)):
        stream = run(index, [(1, 1)], length, weights=weights, skip=gone)
        assert not set(stream["sample_id"].tolist()) & set(gone)
        assert len(set(stream["sample_id"].tolist())) >= 30
        assert len(make_plan(index, weights, ids)) == length
    recipe = Recipe(UNICLIP, 8)
    hashes = {recipe.fingerprint(**Indexed.open(index.folder, weights, skip, Place()).chosen)
              for weights in ({}, {"cc": 0.5}) for skip in (ids, ids[:0])}
    assert len(hashes) == 4
    assert recipe.fingerprint() == recipe.fingerprint(**Indexed.open(index.folder, {"cc": 1.0}, ids[:0], Place()).chosen)


@pytest.mark.parametrize("weights, skip, message", [
    ({"cc3m": 1.0}, [], "source 'cc3m', which .* has not: it has 'cc', 'coco', 'flickr'"),
    ({"cc": 300.0}, [], "cc = 300.0 is not in 0 … 255"),
    ({"cc": 0.0, "coco": 0.0, "flickr": 0.0}, [], "no sample is left of 42"),
    ({}, NUMBER, "42 skipped"),
])
def test_plans_that_cannot_be_are_refused(index, weights, skip, message):
    with pytest.raises(InputError, match=message):
        make_plan(index, weights, np.array(sorted(skip), np.int64))


def test_a_skip_list_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("x")
    pq.write_table(pa.table({"sample_id": ["1"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "c.parquet")
    for name in ("a.parquet", "b.parquet", "c.parquet", "none.parquet"):
        with pytest.raises(InputError, match=f"{name}.*sample_id"):
            read_skip_lists((tmp_path / name,))


def test_a_logged_sample_can_be_made_again(index, tmp_path):
    stream = loader(index, 8, executor="pillow")
    batch = stream.batch_at(0)
    stream.close()
    for b in range(8):
        row = int(np.flatnonzero(index.columns(np.arange(42))["sample_id"] == int(batch.sample_id[b]))[0])
        image = upright_rgb(encoded(picture(row, 40 + row, 50)))
        for v in range(3):
            assert np.array_equal(view(image, batch.vectors[b, v].numpy(), 8), batch.views[v][b].numpy())
    out = tmp_path / "again.png"
    vector = json.dumps(batch.vectors[0, 1].tolist())
    draw_replay(index, out, int(batch.sample_id[0]), vector, 8)
    assert np.array_equal(normalised(np.asarray(Image.open(out))), batch.views[1][0].numpy())
    for sample, told, message in ((1000, "[1]", "give a JSON list of 11 finite numbers"), (1000, "x", "give a JSON list"),
                                   (1, json.dumps([1e39] * 11), "11 finite numbers"), (1, vector, "has no sample with id 1")):
        with pytest.raises(InputError, match=message):
            draw_replay(index, out, sample, told, 8)


def test_the_loader_has_no_other_state(index):
    """Nothing but the cursor: a loader that is asked out of order answers the same."""
    ordered, again = loader(index, 10), loader(index, 10)
    positions = [0, 70, 20, 70, 33]
    one = [ordered.batch_at(p).vectors for p in positions]
    two = {p: again.batch_at(p).vectors for p in reversed(positions)}
    assert all(torch.equal(a, two[p]) for a, p in zip(one, positions, strict=True))
    ordered.close()
    again.close()


def test_a_takedown_leaves_the_rest_of_the_stream_as_it_was(index, tmp_path):
    shutil.copytree(index.folder, tmp_path / "set")
    write_skips(tmp_path / "set" / FORGOTTEN_NAME, {ID[5]: "asked", ID[30]: "asked"})
    one, two = loader(index, 42, executor="pillow"), loader(Index.open(tmp_path / "set"), 42, executor="pillow")
    before, (after, _) = one.batch_at(0), next(stream := iter(two))
    gone = torch.isin(before.sample_id, torch.tensor([ID[5], ID[30]]))
    assert torch.equal(after.valid, ~gone)
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in FIELDS)
    assert torch.equal(before.views[2][~gone], after.views[2][~gone])
    assert not torch.equal(before.views[2][gone], after.views[2][gone])
    assert two._ledger.bad == 0, "a takedown is no fault"
    stream.close()
    one.close()
    streamed = Stream.open(f"{tmp_path}/set/{{000..004}}.tar", np.array([ID[7]]))
    assert {*streamed.skip_ids, *streamed.gone.ids} == {ID[5], ID[7], ID[30]}


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_run_goes_on_after_a_takedown(index, tmp_path, rewrite):
    merged, bad = tmp_path / "m", tmp_path / "bad.jsonl"
    shutil.copytree(index.folder, tmp_path / "set")
    merge(merged, [Input(tmp_path / "set", 2)])
    never = Indexed.open(merged, {}, np.empty(0, np.int64), Place())
    cursor, recipe = Cursor(3, 0, never.fingerprint, "", 1), Recipe(UNICLIP, 8, "pillow", 1)

    def stream(data: Indexed, cursor: Cursor, ledger: Ledger):
        batches = iter(data.loader(tokens, recipe, cursor, 10, ledger=ledger))
        yield from batches
        batches.close()

    whole = stream(never, cursor, Ledger(None, 1.0))
    first = next(whole)
    expected = [next(whole)[0] for _ in range(8)]
    whole.close()
    seen = set(first[0].sample_id.tolist())
    later = next(one for one in expected[-1].sample_id.tolist() if one not in seen)
    gone = [first[0].sample_id[0].item(), later]
    done = forget(merged, parse(map(str, gone)), rewrite=rewrite)
    assert (done.indexed, done.removed) == (2, 2 * rewrite)
    resumed = Indexed.open(merged, {}, np.empty(0, np.int64), Place())
    replace(cursor, index=resumed.fingerprint).refuse_other(first[1])
    after = stream(resumed, first[1], Ledger(bad, 0.0))
    for batch in expected:
        again, left = next(after)[0], ~torch.isin(batch.sample_id, torch.tensor(gone))
        assert torch.equal(again.sample_id, batch.sample_id)
        assert torch.equal(again.vectors, batch.vectors)
        assert torch.equal(again.valid, left)
        for one, two in zip([batch.tokens, batch.group_id, *batch.views], [again.tokens, again.group_id, *again.views],
                            strict=True):
            assert torch.equal(one[left], two[left])
    after.close()
    assert not bad.exists()
    told = set(resumed.captions())
    number = [NUMBER[one] for one in gone]
    assert not told & {f"caption {10 * n}" for n in number}
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert all((f"caption {10 * n}\"".encode() in held) != rewrite for n in number)
    for folder in (merged, tmp_path / "set"):
        opened = Index.open(folder)
        texts = [opened.captions(row) for row in range(len(opened))]
        assert (len(texts), [FORGOTTEN] * (1 + number[0] % 3) in texts) == (42, rewrite)
        assert [shard["sha256"] for shard in opened.manifest["shards"]] == [sha256_of(folder / n) for n in opened.shards]
    assert merge(merged, [Input(tmp_path / "set")])["fingerprint"] != resumed.fingerprint
    assert len(Index.open(merged)) == 40


def test_folders_of_shards_may_move(index, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in index.shards:
        (tmp_path / "elsewhere" / name).write_bytes((Path(index.folder) / name).read_bytes())
    moved = loader(index, 42, place=Place(url=str(tmp_path / "elsewhere")))
    assert moved.batch_at(0).valid.all()
    moved.close()


def test_weights_of_a_merged_index_hold_unless_the_configuration_says_otherwise(index, tmp_path):
    shutil.copytree(index.folder, tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    manifest.write_text(json.dumps({**open_json(manifest.read_bytes()), "weights": {"cc": 3.0}}))
    nothing = np.empty(0, np.int64)
    assert len(Indexed.open(tmp_path / "set", {}, nothing, Place()).plan) == 42 + 2 * 14
    assert len(Indexed.open(tmp_path / "set", {"cc": 1.0}, nothing, Place()).plan) == 42

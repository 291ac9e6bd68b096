"""Features are computed once, under a name made of everything they depend on."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded, picture

from evaluation import cache as cache_module
from evaluation.cache import META, Cache
from evaluation.subject import Subject
from pipeline.console import InputError, WorkFailed
from pipeline.evalsets import open_evalset, write_evalset
from pipeline.seals import open_json


def encode_image(image_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h_BW = image_BCHW.mean(dim=(2, 3))
    return h_BW, 2 * h_BW[:, :2]


def stub(weights: str = "w", transform: str = "t") -> Subject:
    """A model that tells the mean colour."""
    return Subject("stub", Path(), weights, "tokens", transform, torch.device("cpu"),
                   lambda data: np.full((3, 4, 4), len(data) % 97, np.float32), encode_image,
                   lambda token_BL: token_BL[:, :2].float(), lambda texts: np.array([[len(t), 1, 0, 0] for t in texts]), 0,
                   torch.nn.Identity())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_evalset(tmp_path / "set", "test", [(encoded(picture(i)), i % 3) for i in range(70)], "classification",
                  ["a", "b", "c"], per_shard=30)
    return tmp_path / "set"


def test_unchanged_weights_and_data_hit_and_changed_ones_do_not(folder: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "features")
    first = cache.images(stub(), open_evalset(folder))
    assert (cache.hits, cache.misses) == (0, 1)
    again = Cache(tmp_path / "features")
    second = again.images(stub(), open_evalset(folder))
    assert (again.hits, again.misses) == (1, 0)
    assert torch.equal(first.h_NW, second.h_NW) and torch.equal(first.z_ND, 2 * first.h_NW[:, :2])
    assert second.label_N.tolist() == [i % 3 for i in range(70)]
    for other in (stub("other"), stub(transform="other"), replace(stub(), device=torch.device("meta"))):
        if other.device.type == "cpu":
            again.images(other, open_evalset(folder))
    assert again.misses == 2
    shutil.copytree(folder, tmp_path / "moved")
    again.images(stub(), open_evalset(tmp_path / "moved"))
    assert again.hits == 2  # the content counts, not the place
    (folder / "classnames.txt").write_text("b\na\nc\n")
    again.images(stub(), open_evalset(folder))
    assert again.misses == 3


def test_features_are_mapped_not_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    memmap = np.memmap
    monkeypatch.setattr(cache_module.np, "memmap", lambda *words, **named: modes.append(words[2]) or memmap(*words, **named))
    found = Cache(tmp_path / "features").images(stub(), open_evalset(folder))
    assert modes == ["c", "c"]
    found.h_NW[0] = 7  # a task may change its copy, never the file
    assert Cache(tmp_path / "features").images(stub(), open_evalset(folder)).h_NW[0, 0] != 7


def test_the_order_of_shards_and_their_number_change_nothing(folder: Path, tmp_path: Path) -> None:
    examples = [(image, label) for _, image, label in open_evalset(folder).examples()]
    write_evalset(tmp_path / "one", "test", examples, "classification", ["a", "b", "c"])
    several, one = (Cache(tmp_path / "f").images(stub(), open_evalset(f)) for f in (folder, tmp_path / "one"))
    assert torch.equal(several.h_NW, one.h_NW) and several.targets == one.targets


def test_a_kill_or_a_failure_leaves_no_entry_and_damage_is_noticed(folder: Path, tmp_path: Path) -> None:
    features = tmp_path / "features"
    (features / ".abc.999999999.partial").mkdir(parents=True)  # of a process that is no more
    cache = Cache(features)
    broken = tmp_path / "broken"
    write_evalset(broken, "test", [(encoded(picture(0)), 0), (encoded(picture(1))[:300], 0)], "classification")

    def strict(data: bytes) -> np.ndarray:
        from pipeline.replay import eval_view
        return eval_view(data, 4)

    with pytest.raises(WorkFailed, match="key s0000001: the image cannot be decoded"):
        cache.images(replace(stub(), view=strict), open_evalset(broken))
    assert list(features.iterdir()) == []
    cache.images(stub(), open_evalset(folder))
    entry, = features.iterdir()
    (entry / "h.f32").write_bytes(b"1234")
    assert cache.images(stub(), open_evalset(folder)).h_NW.shape == (70, 3) and cache.misses == 3
    write_evalset(tmp_path / "none", "test", [(encoded(picture(0)), 0)], "classification")
    tarfile.open(tmp_path / "none/test/0.tar", "w").close()
    for _ in range(2):
        with pytest.raises(InputError, match="none/test holds no image at all"):
            cache.images(stub(), open_evalset(tmp_path / "none"))
    (entry / META).unlink()
    cache.images(stub(), open_evalset(folder))
    assert cache.misses == 6 and [path.name for path in features.iterdir()] == [entry.name]


def test_an_entry_of_an_older_version_is_taken_while_its_sizes_fit(folder: Path, tmp_path: Path) -> None:
    """It told the shapes alone, without checksums."""
    def whole() -> bool:
        cache = Cache(tmp_path / "features")
        assert cache.images(stub(), open_evalset(folder)).h_NW.shape == (70, 3)
        return bool(cache.hits)

    whole()
    entry, = (tmp_path / "features").iterdir()
    (entry / META).write_text(json.dumps(open_json((entry / META).read_bytes())["shapes"]))
    assert whole()
    (entry / "z.f32").write_bytes((entry / "z.f32").read_bytes()[:-4])
    assert not whole() and whole()


def test_texts_are_kept_by_what_they_say(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "features")
    assert cache.texts(stub(), ["one", "three"]).tolist() == [[3, 1], [5, 1]]
    cache.texts(stub(), ["one", "three"])
    cache.texts(stub(), ["three", "one"])
    cache.texts(replace(stub(), text_sha256="other tokenizer"), ["one", "three"])
    assert (cache.hits, cache.misses) == (1, 3)

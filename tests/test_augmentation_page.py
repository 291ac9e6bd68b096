"""docs/augmentation.md is true: its table is the schema, its patch adds a twelfth number that both executors agree on."""

import re
import shutil
import subprocess
import sys

from conftest import ROOT

from pipeline.sampling import KINDS, RECIPES
from pipeline.schema import VECTOR

PAGE = (ROOT / "docs" / "augmentation.md").read_text()

CHECK = """
import sys; sys.path.insert(1, {tests!r})
from dataclasses import replace
import numpy as np
import torch
from conftest import encoded, picture
from pipeline import replay, sampling, schema
from pipeline.views import DaliExecutor
from trainer.config import ViewConfig

assert schema.__file__.startswith({copy!r}), schema.__file__
ids, sizes = np.arange(40), np.tile([80, 60], (40, 1))
kinds = (sampling.WEAK, replace(sampling.STRONG, solarize_p=0.5))
vectors = sampling.sample_vectors(7, 0, 0, ids, sizes, kinds)
np.save("vectors.npy", vectors)
assert vectors.shape == (40, 2, 12) and 8 < vectors[:, 1, 11].sum() < 32 and not vectors[:, 0, 11].any()
ViewConfig(area=(0.1, 1.0), solarize_p=0.2)
alone = schema.IDENTITY.copy()
alone[11] = 1
image = picture(11, 96, 96)
plain = replay.pixels(image, schema.IDENTITY, 64)
assert np.array_equal(replay.pixels(image, alone, 64), np.where(plain >= 128, 255 - plain, plain))
data = [encoded(picture(n)) for n in range(40)]
views = [executor(data, vectors, ids)[0] for executor in (DaliExecutor(64, 1), replay.PillowExecutor(64, 1))]
difference = torch.cat([(a - b).abs() * torch.tensor(schema.STD).view(3, 1, 1) * 255 for a, b in zip(*views, strict=True)])
assert difference.mean() <= 0.3, difference.mean()
"""


def test_the_table_is_the_schema():
    rows = re.findall(r"^\| [\d–]+ \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert [name.strip() for row in rows for name in row.split(",")] == [field.name for field in VECTOR]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)))
    assert set(named) == set(RECIPES)
    assert {kind for views in RECIPES.values() for kind in views} == set(KINDS)


def test_the_patch_adds_a_twelfth_number(tmp_path):
    import numpy as np

    from pipeline.sampling import STRONG, WEAK, sample_vectors

    for package in ("pipeline", "trainer"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (patch,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "twelfth.diff").write_text(patch)
    applied = subprocess.run(["git", "apply", "-C1", "twelfth.diff"], cwd=tmp_path, capture_output=True, text=True,
                             env={"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PATH": "/usr/bin:/bin"})
    assert applied.returncode == 0, applied.stderr
    done = subprocess.run([sys.executable, "-c", CHECK.format(tests=str(ROOT / "tests"), copy=str(tmp_path))], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = np.arange(40)
    before = sample_vectors(7, 0, 0, ids, np.tile([80, 60], (40, 1)), (WEAK, STRONG))
    assert np.array_equal(np.load(tmp_path / "vectors.npy")[:, :, :11], before), "the other eleven moved"

"""Pictures of views show the samples that the run of a configuration sees."""

from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import command, encoded, picture
from shards import write_set

from pipeline.index import Index
from pipeline.loader import Indexed
from pipeline.picture import Drawing, first_samples
from pipeline.plan import read_skip_lists
from pipeline.reader import Place
from pipeline.recipe import Cursor, Recipe
from trainer.config_file import load_config


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    """24 samples of two sources."""
    samples = [(encoded(picture(n)), {"caption": f"picture {n}", "source": "ab"[n % 2], "url": f"http://host/{n}"})
               for n in range(24)]
    return Index.open(write_set(tmp_path_factory.mktemp("set"), samples, per_tar=12))


def test_the_runs_plan_is_drawn(index, tmp_path):
    ids = index.columns(np.arange(len(index)))["sample_id"]
    pq.write_table(pa.table({"sample_id": ids[:9]}), tmp_path / "skip.parquet")
    config = load_config("scenes-tiny", [f"data.index={index.folder}", f"data.skip=['{tmp_path / 'skip.parquet'}']",
                                         "data.weights={a = 0.5, b = 2}", "run.seed=7"])
    stored = tmp_path / "config.toml"
    stored.write_text(config.to_toml())
    data = Indexed.open(index.folder, config.data.weights, read_skip_lists(config.data.skip), Place())
    recipe = Recipe(config.data.kinds(), 16, "pillow", 1)
    loader = iter(data.loader(lambda words: np.zeros((len(words), 4), np.int64), recipe, Cursor(7, 0, "", ""), 10))
    seen = [batch.sample_id.tolist() for batch, _ in islice(loader, 1)][0]
    loader.close()
    drawing = Drawing.of_run(stored)
    assert drawing.kinds == config.data.kinds()
    assert [ids[row] for row in first_samples(index, drawing, 10)[0]] == seen
    done = command("uniclip-data", "views", index.folder, tmp_path / "views.png", "--config", stored, "--samples", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "views.png").stat().st_size > 10_000


def test_what_was_taken_down_is_not_drawn(index):
    drawing = Drawing.of_recipe("clip", 16, 0)
    before = index.columns(first_samples(index, drawing, 24)[0])["sample_id"].tolist()
    command("uniclip-data", "forget", index.folder, *(str(one) for one in before[:3]))
    after = index.columns(first_samples(index, drawing, 4)[0])["sample_id"].tolist()
    (index.folder / "forgotten.parquet").unlink()
    assert after == before[3:7]

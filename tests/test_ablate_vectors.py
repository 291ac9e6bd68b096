"""What an augmentation vector is worth at test time: every way of seeing, every vector, against evaluation's own number."""

import json

import numpy as np
import pytest
import torch
from conftest import command
from short_runs import begin

from pipeline.evalsets import open_evalset
from pipeline.replay import center_crop
from tools.ablate_vectors import CENTRE, METRIC, _squares, recalls, table
from trainer import checkpoint


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors") / "run"
    begin(scenes, folder)
    return folder


def test_every_way_of_seeing_is_measured_with_every_vector(scenes, run, tmp_path):
    out, evalset = tmp_path / "v.json", scenes / "evalsets/retrieval"
    done = command("python", "-m", "tools.ablate_vectors", evalset, run, run, "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[4:]] == [CENTRE, "weak", "strong"]
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * 3 * 3
    assert command("uniclip-eval", "retrieval", run, evalset).returncode == 0
    measured = {row["metric"]: row["value"] for row in map(json.loads, (run / "results.jsonl").read_text().splitlines())}
    assert {row[METRIC] for row in rows if (row["seen_as"], row["vector"]) == (CENTRE, "identity")} == {measured[METRIC]}


def test_one_run_has_no_standard_error():
    found = {(CENTRE, "true"): 0.25, (CENTRE, "identity"): 0.2, (CENTRE, "shuffled"): 0.1}
    assert "nan" not in table([found]) and "| 25.0 | 20.0 (-5.0) | 10.0 (-15.0) |" in table([found])
    assert "± 0.0" in table([found, found])


def test_the_vector_is_all_that_differs(scenes, run, monkeypatch):
    evalset, loaded = open_evalset(scenes / "evalsets/retrieval"), checkpoint.load_model(run)
    given = []
    monkeypatch.setattr("tools.ablate_vectors.open_model", lambda *_: loaded)
    project = loaded.model.project_image
    monkeypatch.setattr(loaded.model, "project_image", lambda h, vector: given.append((h, vector)) or project(h, vector))
    recalls(run, evalset)
    for (h, true), (h_identity, identity), (h_shuffled, shuffled) in zip(*[iter(given)] * 3, strict=True):
        assert h is h_identity is h_shuffled
        assert (identity == loaded.model.identity_A).all()
        assert sorted(map(tuple, true.tolist())) == sorted(map(tuple, shuffled.tolist()))
    true, _, shuffled = (vector for _, vector in given[-3:])  # strong views: no two alike
    assert (true != shuffled).any(dim=1).all()
    with torch.no_grad():
        for layer in loaded.model.augmentation.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.zero_()
    deaf = recalls(run, evalset)
    assert all(deaf[name, which] == deaf[name, "true"] for name, which in deaf)


def test_squares_of_any_side_are_seen_inside_the_image(scenes, run, tmp_path):
    found = recalls(run, open_evalset(scenes / "evalsets/retrieval"), sides=(1.0, 0.6))
    assert found["square of 1", "true"] == found[CENTRE, "true"]
    central_NA = np.stack([center_crop(90, 60), center_crop(40, 40)])
    square_NA = _squares(central_NA, 0.5)
    x_N, y_N, w_N, h_N = square_NA[:, :4].T
    assert np.allclose(w_N * (90, 40), h_N * (60, 40)) and np.allclose(h_N, 0.5)
    assert (x_N >= 0).all() and (y_N >= 0).all() and (x_N + w_N <= 1).all() and (y_N + h_N <= 1).all()
    assert (square_NA[:, 4:] == central_NA[:, 4:]).all()


def test_a_model_that_takes_no_vector_is_seen_in_every_way_too(scenes, run, tmp_path):
    plain, evalset = tmp_path / "run", scenes / "evalsets/retrieval"
    begin(scenes, plain, **{"objective.name": "clip", "optim.samples": 32, "optim.warmup_samples": 16})
    done = command("python", "-m", "tools.ablate_vectors", evalset, plain)
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[4:]] == [CENTRE, "weak"], done.stderr
    assert all(line.split("|")[3:5] == ["  ", "  "] for line in done.stdout.splitlines()[4:])
    done = command("python", "-m", "tools.ablate_vectors", evalset, run, plain)
    assert done.returncode == 2 and "give runs of one configuration" in done.stderr.splitlines()[-1]

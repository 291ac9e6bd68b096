"""Evaluation against plain computations, against itself at other sizes, and against wrong input."""

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded, picture
from rich.console import Console
from tiny import tiny_run

from evaluation import cli, retrieval, zeroshot
from evaluation.check import check
from evaluation.embed import embed_images, embed_texts, placed
from evaluation.evaluate import Bench, evaluate
from evaluation.prompts import class_embeddings, prompts_sha256
from evaluation.statistics import bootstrap, wilson
from evaluation.subject import Subject, checkpoint_subject
from evaluation.task import Pairs
from pipeline.console import InputError, WorkFailed
from pipeline.evalsets import open_evalset, write_evalset
from pipeline.index import Index
from pipeline.replay import eval_view
from trainer.batches import IMAGE_BATCH, LENGTHS, TEXT_BATCH
from trainer.checkpoint import Loaded, load_model


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(scenes, tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(scope="module")
def loaded(run: Path) -> Loaded:
    return load_model(run)


@pytest.fixture(scope="module")
def subject(run: Path) -> Subject:
    return checkpoint_subject(run, "cpu")


def images(subject: Subject, examples: list) -> tuple[np.ndarray, np.ndarray]:
    """h and z of all examples."""
    parts = list(embed_images(subject, examples))
    return np.concatenate([h for h, _ in parts]), np.concatenate([z for _, z in parts])


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """70 pictures with one to three captions each: more than one image batch."""
    words = ["red", "blue", "green", "small", "large"]
    examples = [(encoded(picture(i)), [f"{words[i % 5]} {words[i // 5 % 5]} {words[i // 25]} {words[k]}"
                                       for k in range(1 + i % 3)]) for i in range(IMAGE_BATCH + 6)]
    write_evalset(tmp_path / "several", "test", examples, "retrieval")
    return tmp_path / "several"


def test_wilson_reproduces_published_intervals() -> None:
    """Newcombe 1998, table I, score method without continuity correction."""
    for hits, n, low, high in ((81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, 0, .1611), (1, 29, .0061, .1718)):
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    with pytest.raises(ValueError, match="3 hits of 2"):
        wilson(3, 2)


@pytest.mark.parametrize(("share", "n"), [(0.5, 40), (0.1, 60), (0.93, 200), (0.01, 1000)])
def test_wilson_covers_as_often_as_it_says(share: float, n: int) -> None:
    hits = np.random.default_rng(0).binomial(n, share, 4000)
    covered = np.mean([low <= share <= high for low, high in map(wilson, hits.tolist(), itertools.repeat(n))])
    assert 0.92 < covered < 0.98


def test_bootstrap_over_images_covers_when_captions_depend_on_each_other() -> None:
    rng = np.random.default_rng(1)
    truth, images, texts = 0.6, 60, 5
    covered = {"images": 0, "captions": 0}
    for trial in range(200):
        hits_N = rng.binomial(texts, rng.beta(0.6, 0.4, images))  # an image is easy or hard for all its captions
        low, high = bootstrap(lambda weight_N, h=hits_N: float(weight_N @ h / (weight_N.sum() * texts)), images, trial, 200)
        covered["images"] += low <= truth <= high
        low, high = wilson(int(hits_N.sum()), images * texts)
        covered["captions"] += low <= truth <= high
    assert 178 <= covered["images"] <= 199 and covered["captions"] < 160


def test_bootstrap_is_seeded_and_agrees_with_wilson_where_both_hold() -> None:
    hit_N = np.arange(400) % 4 == 0
    def share(weight_N: np.ndarray) -> float:
        return float(weight_N @ hit_N / 400)
    assert bootstrap(share, 400, 3) == bootstrap(share, 400, 3) != bootstrap(share, 400, 4)
    assert bootstrap(share, 400, 3) == pytest.approx(wilson(100, 400), abs=0.01)


def test_embeddings_do_not_depend_on_how_many_are_asked_for(subject: Subject, several: Path) -> None:
    examples = list(placed(open_evalset(several)))
    texts = [f"a {word} circle number {i}" for i in range(TEXT_BATCH // 2 + 5) for word in ("red", "blue")]
    whole = images(subject, examples)
    for count in (1, 7, IMAGE_BATCH, IMAGE_BATCH + 1):
        assert all(np.array_equal(part, all_of[:count])
                   for part, all_of in zip(images(subject, examples[:count]), whole, strict=True))
    whole = embed_texts(subject, texts)
    assert all(torch.equal(embed_texts(subject, texts[:count]), whole[:count]) for count in (1, 7, TEXT_BATCH))


def test_texts_without_their_padding_equal_texts_with_it(subject: Subject, loaded: Loaded) -> None:
    texts = ["red", "a small red circle", "a small red circle above a large blue square", "one two three " * 9]
    assert min(LENGTHS) < loaded.tokenizer.context
    torch.testing.assert_close(embed_texts(subject, texts), plain_texts(loaded, texts), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def plain_images(loaded: Loaded, folder: Path) -> tuple[torch.Tensor, torch.Tensor, list]:
    """z, h and targets of a whole set in one batch of its own size."""
    examples = list(open_evalset(folder).examples())
    pixels = torch.from_numpy(np.stack([eval_view(image, loaded.image_size) for _, image, _ in examples]))
    return loaded.model.encode_image(pixels), loaded.model.image_features(pixels), [target for *_, target in examples]


@torch.no_grad()
def plain_texts(loaded: Loaded, texts: list[str]) -> torch.Tensor:
    return loaded.model.encode_text(torch.from_numpy(loaded.tokenizer(texts)))


def test_embeddings_equal_the_model_called_by_hand(loaded: Loaded, subject: Subject, several: Path) -> None:
    z, h, captions = plain_images(loaded, several)
    embedded = images(subject, list(placed(open_evalset(several))))
    torch.testing.assert_close(torch.from_numpy(embedded[0]), h, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(embedded[1]), z, atol=1e-5, rtol=1e-5)
    texts = sum(captions, [])
    torch.testing.assert_close(embed_texts(subject, texts), plain_texts(loaded, texts), atol=1e-5, rtol=1e-5)


def test_prompts_across_classes_equal_class_by_class(subject: Subject) -> None:
    names, templates = ["red", "blue", "green"], ["a {c} circle", "a small {c} square", "{c} and {c}"]
    together = class_embeddings(lambda texts: embed_texts(subject, texts), names, templates)
    for name, w_D in zip(names, together, strict=True):
        prompts = [embed_texts(subject, [template.format(c=name)])[0] for template in templates]
        mean = torch.stack([z / z.norm() for z in prompts]).mean(0)
        torch.testing.assert_close(w_D, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    assert prompts_sha256(names, templates) != prompts_sha256(names[::-1], templates)
    assert prompts_sha256(names, templates) != prompts_sha256(names, templates[:2])


def test_zeroshot_scores_by_hand() -> None:
    label_N, rank_N = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 2, 0, 5, 0, 4])
    ranks = {"class": (rank_N, label_N)}
    found = {m.metric: m for m in zeroshot.scores(ranks, classes=8, seed=0, main_is_mean=False)}
    assert found["accuracy"].value == 3 / 6 and found["accuracy"].interval == wilson(3, 6)
    assert found["accuracy@5"].value == 5 / 6 and found["accuracy@5"].chance == 5 / 8
    assert found["mean_per_class_recall"].value == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert [m.metric for m in found.values() if m.main_metric] == ["accuracy"]
    few = zeroshot.scores(ranks, classes=5, seed=0, main_is_mean=True)
    assert [(m.metric, m.main_metric) for m in few] == [("accuracy", False), ("mean_per_class_recall", True)]


def test_a_mean_over_classes_that_are_all_right_or_all_wrong_is_not_certain() -> None:
    for rank_N, hits in (([0, 0, 0, 0, 9, 9, 9, 9], 4), ([9] * 8, 0), ([0] * 8, 8)):
        ranks = {"class": (np.array(rank_N), np.repeat([0, 1], 4))}
        found = {m.metric: m for m in zeroshot.scores(ranks, 2, 0, False)}["mean_per_class_recall"]
        assert found.value == hits / 8 and found.interval == pytest.approx(wilson(hits, 8))  # equal classes: the plain share


def test_chance_of_retrieval_by_enumeration() -> None:
    texts_N = np.array([1, 2, 3])  # captions 0 | 1, 2 | 3, 4, 5
    owner = [0, 1, 1, 2, 2, 2]
    for k in (1, 2, 5, 10):
        draws = list(itertools.combinations(range(6), min(k, 6)))
        expected = np.mean([any(owner[t] == i for t in draw) for draw in draws for i in range(3)])
        assert retrieval._chance(texts_N, k) == pytest.approx(expected)


def test_retrieval_rows_equal_a_plain_computation(loaded: Loaded, subject: Subject, several: Path, tmp_path: Path) -> None:
    rows = evaluate("retrieval", Bench.of(subject, tmp_path / "r.jsonl"), [several])
    z, _, captions = plain_images(loaded, several)
    owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    cosine = torch.cosine_similarity(z[:, None], plain_texts(loaded, sum(captions, []))[None], dim=-1).numpy()
    found = {row["metric"]: row["value"] for row in rows}
    for k in (1, 5, 10):
        texts_found, images_found = np.argsort(-cosine, axis=1)[:, :k], np.argsort(-cosine.T, axis=1)[:, :k]
        hits = [i in owner[texts] for i, texts in enumerate(texts_found)]
        assert found[f"image_to_text_recall@{k}"] == np.mean(hits)
        hits = [i in images for i, images in zip(owner, images_found, strict=True)]
        assert found[f"text_to_image_recall@{k}"] == np.mean(hits)
    assert found["text_to_image_recall@10"] > 0 and [row["n"] for row in rows[::3]] == [len(captions), len(owner)]
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows)


def test_equal_captions_of_several_images_are_told_and_merged_on_the_side() -> None:
    """Image 1 is nearest to caption 2, which says what its own says; caption 0 finds image 0 behind image 2, its twin."""
    image = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.9, 0.0, 0.2]])
    text = torch.tensor([[0.9, 0.0, 0.2], [0.1, 0.5, 0.9], [0.0, 1.0, 0.1], [0.5, 0.0, 0.5]])
    captions, owner = ["a  Dog", "a cat", "A cat", "a dog"], np.array([0, 1, 2, 2])
    pairs = Pairs(image, text, captions, owner)
    found = retrieval.rank_merged(pairs, np.array([1, 0, 0, 1]))
    cosine = torch.cosine_similarity(image[:, None], text[None], dim=-1).numpy()
    right_NT = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]], bool)
    for whose, score, right in (("image", cosine, right_NT), ("text", cosine.T, right_NT.T)):
        best = np.where(right, score, -2).max(axis=1, keepdims=True)
        assert found[whose].tolist() == ((score >= best) & ~right).sum(axis=1).tolist()
    told = retrieval._of_shared_captions(pairs)
    strict = {m.metric: m.value for m in retrieval.scores(retrieval.rank_both(pairs), 0)}
    assert told["shared_captions"] == 4 and "4 of 4 captions belong to several images" in told["note"]
    assert set(told["captions_merged"]) == set(strict)
    assert told["captions_merged"]["image_to_text_recall@1"] == 1.0 and strict["image_to_text_recall@1"] == 1 / 3
    assert told["captions_merged"]["text_to_image_recall@1"] == 1.0 > strict["text_to_image_recall@1"]
    assert retrieval._of_shared_captions(Pairs(image, text, ["a", "b", "c", "c"], owner)) == {}  # one image's own twice


def test_zeroshot_rows_equal_a_plain_computation(loaded: Loaded, subject: Subject, scenes: Path, tmp_path: Path) -> None:
    rows = evaluate("zeroshot", Bench.of(subject, tmp_path / "r.jsonl"), [scenes / "evalsets/colour"])
    evalset = open_evalset(scenes / "evalsets/colour")
    prompts = [plain_texts(loaded, [t.format(c=c) for t in evalset.templates]) for c in evalset.classnames]
    weight_CD = torch.stack([(z / z.norm(dim=1, keepdim=True)).mean(0) for z in prompts])
    weight_CD /= weight_CD.norm(dim=1, keepdim=True)
    z, _, labels = plain_images(loaded, scenes / "evalsets/colour")
    hits = (z @ weight_CD.T).argmax(dim=1) == torch.tensor(labels)
    assert {row["metric"]: row["value"] for row in rows}["accuracy"] == hits.float().mean().item()
    assert {row["metric"] for row in rows} == {"accuracy", "accuracy@5", "mean_per_class_recall"}


def test_finished_rows_are_skipped_until_something_they_depend_on_changes(
        loaded: Loaded, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "shape", tmp_path / "results.jsonl"
    shutil.copytree(scenes / "evalsets/shape", folder)
    (folder / "zeroshot_classification_templates.txt").write_text("a small red {c}\n")

    def measured(checkpoint: Path) -> int:
        before = len(out.read_text().splitlines()) if out.exists() else 0
        evaluate("zeroshot", Bench.of(checkpoint_subject(checkpoint, "cpu"), out), [folder])
        return len(out.read_text().splitlines()) - before

    assert measured(loaded.run) == 3 and "skipped" not in capsys.readouterr().out
    assert measured(loaded.run) == 0 and "shape (test), zeroshot: finished on" in capsys.readouterr().out
    assert measured(loaded.run / "checkpoints/000000000032") == 3
    (folder / "zeroshot_classification_templates.txt").write_text("a large red {c}\n")
    assert measured(loaded.run) == 3
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["checkpoint"] for row in rows[::3]] == ["000000000048", "000000000032", "000000000048"]
    assert len({row["weights_sha256"] for row in rows}) == 2 == len({row["prompts_sha256"] for row in rows})
    assert set(rows[0]) == {
        "dataset", "split", "task", "metric", "n", "value", "interval", "chance", "main_metric", "weights_sha256",
        "data_sha256", "prompts_sha256", "transform", "protocol", "outcomes", "details", "alarm", "versions", "seed",
        "checkpoint", "seconds", "created", "crc32"}


def test_classes_of_one_name_are_told(subject: Subject, tmp_path: Path) -> None:
    for name, names in (("same", ["x", "X"]), ("own", ["x", "y"])):
        pairs = [(encoded(picture(i)), i % 2) for i in range(4)]
        write_evalset(tmp_path / name, "test", pairs, "classification", names, ["{c}"])
        rows = evaluate("zeroshot", Bench.of(subject, tmp_path / "r.jsonl"), [tmp_path / name])
        assert rows[0]["details"].get("note", "").startswith("several classes share a name (x)") == (name == "same")


def test_an_index_becomes_a_retrieval_set(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "data", "retrieval", scenes / "train", tmp_path / "set", "--split", "val") == 0
    index = Index.open(scenes / "train")
    examples = list(open_evalset(tmp_path / "set", "val").examples())
    assert [captions for *_, captions in examples] == [index.captions(row) for row in range(len(index))]
    columns = index.columns(np.arange(len(index)))
    with (index.folder / index.shards[columns["shard"][5]]).open("rb") as shard:
        shard.seek(columns["offset"][5])
        assert shard.read(columns["size"][5]) == examples[5][1]


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run `uniclip-eval` in this process → its exit code."""
    from evaluation.cli import main

    monkeypatch.setattr(sys, "argv", ["uniclip-eval", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def broken(folder: Path) -> Path:
    write_evalset(folder, "test", [(encoded(picture(0)), 0), (encoded(picture(1))[:400], 0)], "classification", ["x"],
                  ["a {c}"])
    return folder


WRONG = {
    "no set": (lambda run, tmp: ("zeroshot", run, tmp / "none"), 2, "evaluation set {tmp}/none does not exist"),
    "no split": (lambda run, tmp: ("zeroshot", run, broken(tmp / "s"), "--split", "val"), 2, "splits present: test"),
    "no checkpoint": (lambda run, tmp: ("zeroshot", tmp, broken(tmp / "s")), 2, "{tmp} holds no checkpoint"),
    "other kind": (lambda run, tmp: ("retrieval", run, broken(tmp / "s")), 2, "use `uniclip-eval zeroshot`"),
    "no GPU": (lambda run, tmp: ("zeroshot", run, broken(tmp / "s"), "--device", "cuda:77"), 2, "no CUDA device"),
    "bad image": (lambda run, tmp: ("zeroshot", run, broken(tmp / "s"), "--out", tmp / "r"), 1,
                  "{tmp}/s/test/0.tar, key s0000001: the image cannot be decoded"),
    "no index": (lambda run, tmp: ("data", "retrieval", tmp / "none", tmp / "s"), 2, "{tmp}/none"),
    "no run": (lambda run, tmp: ("report", tmp / "none"), 2, "run folder {tmp}/none does not exist"),
    "no results": (lambda run, tmp: ("report", run, "--results", tmp / "r"), 2, "results file {tmp}/r does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_with_one_clear_line(case: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    words, code, message = WRONG[case]
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert call(monkeypatch, *words(run, tmp_path)) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message.format(tmp=tmp_path) in error


def test_sets_without_names_or_prompts_and_damaged_results_are_named(subject: Subject, tmp_path: Path) -> None:
    bench = Bench.of(subject, tmp_path / "r.jsonl")
    folder = broken(tmp_path / "s")
    (folder / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(InputError, match="s has no zeroshot_classification_templates.txt"):
        evaluate("zeroshot", bench, [folder])
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    (tmp_path / "r.jsonl").write_text('{"metric": "accuracy", "value": 1}\n{"metr\n')
    with pytest.raises(InputError, match=r"r\.jsonl, line 2 is damaged .*remove the line"):
        evaluate("zeroshot", bench, [folder])
    (tmp_path / "r.jsonl").unlink()
    with pytest.raises(WorkFailed):
        evaluate("zeroshot", bench, [folder])
    assert not (tmp_path / "r.jsonl").exists()


def test_help_needs_neither_torch_nor_dali() -> None:
    script = """
import sys
from typer.testing import CliRunner
from evaluation.cli import app
for words in ([], ["retrieval"], ["zeroshot"], ["report"], ["data"], ["data", "retrieval"]):
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0 and (len(words) != 1 or words == ["data"] or "Example" in done.output), done.output
assert not {"torch", "nvidia.dali", "webdataset", "matplotlib", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_name_or_number_of_a_result_is_cut(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of that width, and in a file."""
    row = {"dataset": "open30m-flickr30k-karpathy", "task": "retrieval", "metric": "image_to_text_recall@10", "value": 0.51234,
           "interval": (0.4, 0.6), "chance": 0.001, "n": 1_234_567, "main_metric": True}
    for terminal in (True, False):
        written = io.StringIO()
        monkeypatch.setattr("pipeline.console.out", Console(file=written, force_terminal=terminal, width=columns))
        cli._show(Path("results.jsonl"), [row])
        shown = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in written.getvalue().splitlines()]
        assert shown[1] == [row["dataset"], row["metric"], "51.2%", "40.0%", "–", "60.0%", "0.1%", "1,234,567"]


def test_a_missing_checkpoint_and_a_wrong_device_are_told_at_once(scenes: Path, run: Path) -> None:
    evalset = scenes / "evalsets/retrieval"
    code = ("import sys; from evaluation.cli import main; sys.argv[0] = 'uniclip-eval'\n"
            "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "retrieval", run / "nowhere", evalset], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"] and f"{run / 'nowhere'} does not exist" in done.stderr
    for device in ("gpu", "cuda:x", "mps", ""):
        with pytest.raises(InputError, match=f"--device {device} is no device"):
            checkpoint_subject(run, device)


def test_an_equal_caption_of_one_image_counts_once_in_every_layout_of_ours(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table/a.png").write_bytes(encoded(picture(1)))
    (tmp_path / "table/captions.tsv").write_text("image\tsplit\tcaption\n" + "".join(
        f"a.png\ttest\t{caption}\n" for caption in ("a dog", "a cat", "a dog")))
    write_evalset(tmp_path / "tars", "test", [(encoded(picture(1)), ["a dog", "a cat", "a  dog"])], "retrieval")
    for name in ("table", "tars"):
        (_, _, captions), = open_evalset(tmp_path / name).examples()
        assert captions == ["a dog", "a cat"]


def test_an_image_under_two_labels_is_told(subject: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    folder.mkdir()
    for name, seed in (("a", 1), ("b", 2), ("copy_of_b", 2)):
        (folder / f"{name}.png").write_bytes(encoded(picture(seed)))
    rows = [("a", "cat"), ("a", "dog"), ("b", "cat"), ("copy_of_b", "dog")]
    (folder / "labels.tsv").write_text("image\tsplit\tlabel\n" + "".join(f"{i}.png\ttest\t{label}\n" for i, label in rows))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    fault, = check(folder).faults
    assert "2 equal images under two labels: a.png as cat, a.png as dog; b.png as cat, copy_of_b.png as dog" in fault
    row, *_ = evaluate("zeroshot", Bench.of(subject, tmp_path / "results.jsonl"), [folder])
    assert "1 images are listed under two labels or more (a.png)" in row["details"]["note"]

"""Two harnesses, one number: CLIP_benchmark as it is and ours, on our checkpoint and on an open_clip model."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded, picture
from tiny import tiny_run

from evaluation.bridge import clip_benchmark
from evaluation.embed import embed_texts
from evaluation.evaluate import Bench, evaluate
from evaluation.prompts import chosen, class_embeddings
from evaluation.subject import Subject, checkpoint_subject, open_clip_subject
from pipeline.console import InputError
from pipeline.evalsets import open_evalset, write_evalset

pytest.importorskip("clip_benchmark", reason="needs the extra `bridge`: pip install 'uniclip[bridge]'")

NAMES = {"accuracy": "acc1", "accuracy@5": "acc5", "mean_per_class_recall": "mean_per_class_recall",
         **{f"image_to_text_recall@{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
         **{f"text_to_image_recall@{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)}}
TASKS = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(scenes, tmp_path_factory.mktemp("bridged") / "run")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A small architecture, registered with open_clip, and random weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny-test.json").write_text(json.dumps({
        "embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-test").state_dict(), folder / "random.pt")
    return "tiny-test", folder / "random.pt"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """80 pictures of other shapes than square with 1 to 7 captions, and with one of 7 labels."""
    root, pictures = tmp_path_factory.mktemp("sets"), [encoded(picture(i, 70 + i % 9, 50 + i % 31)) for i in range(80)]
    words = ["red", "blue", "green", "small", "large", "round", "old"]
    captions = [[f"a {words[(i + k) % 7]} thing, {words[i % 5]} number {i}" for k in range(1 + i % 7)] for i in range(80)]
    write_evalset(root / "pairs", "test", zip(pictures, captions, strict=True), "retrieval")
    write_evalset(root / "words", "test", [(p, i * i % 7) for i, p in enumerate(pictures)], "classification", words,
                  ["a {c} thing", "this looks {c}.", "{c}"])
    return {"retrieval": root / "pairs", "zeroshot": root / "words"}


def theirs(task: str, folder: Path, out: Path, *words: str) -> dict[str, float]:
    clip_benchmark(["eval", "--dataset", "wds/x", "--dataset_root", str(folder), "--task", TASKS[task], "--no_amp",
                    "--quiet", "--num_workers", "0", "--recall_k", "1", "5", "10", "--output", str(out), *words])
    return json.loads(out.read_text())["metrics"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("whose", ["ours", "open_clip"])
def test_both_harnesses_give_the_same_numbers(task: str, whose: str, run: Path, weights: tuple[str, Path],
                                              sets: dict[str, Path], tmp_path: Path) -> None:
    if whose == "ours":
        subject, words = checkpoint_subject(run, "cpu"), ("--pretrained", str(run))
    else:
        subject = open_clip_subject(*weights, "cpu")
        words = ("--model_type", "open_clip", "--model", weights[0], "--pretrained", str(weights[1]))
    rows = evaluate(task, Bench.of(subject, tmp_path / "r.jsonl"), [sets[task]])
    other = theirs(task, sets[task], tmp_path / "theirs.json", *words)
    assert len(rows) == len(other)
    for row in rows:
        assert row["value"] == pytest.approx(other[NAMES[row["metric"]]], abs=1e-4), row["metric"]


def test_features_of_open_clip_models_are_taken_before_the_projection(weights: tuple[str, Path]) -> None:
    import open_clip

    subject = open_clip_subject(*weights, "cpu")
    model = open_clip.create_model(weights[0], pretrained=str(weights[1])).eval()
    with torch.no_grad():
        pixels = torch.rand(3, 3, 32, 32)
        h_BW, z_BD = subject.encode_image(pixels)
        torch.testing.assert_close(z_BD, model.encode_image(pixels), atol=1e-6, rtol=1e-5)
    assert h_BW.shape == (3, 64) and z_BD.shape == (3, 32)


def test_wrong_models_are_named(weights: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="knows no architecture ViT-Q-1"):
        open_clip_subject("ViT-Q-1", weights[1])
    with pytest.raises(InputError, match="weights file .*none.pt does not exist"):
        open_clip_subject(weights[0], tmp_path / "none.pt")
    with pytest.raises(InputError, match="does not fit RN50"):
        open_clip_subject("RN50", weights[1])


def test_published_template_sets_are_open_clips() -> None:
    evalset = type("Set", (), {"templates": ("one {c}",)})
    assert len(chosen("imagenet-80", evalset)) == 80 and len(chosen("imagenet-7", evalset)) == 7  # type: ignore[arg-type]
    assert chosen("imagenet-7", evalset)[0] == "itap of a {c}."  # type: ignore[arg-type]
    assert chosen("set", evalset) == ("one {c}",)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--templates own: give set, imagenet-7"):
        chosen("own", evalset)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_thousand_classes_with_eighty_templates_against_clip_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """CLIP's vocabulary and context, a small tower; the same class embeddings, three times sooner."""
    import open_clip
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    from pipeline.text import CaptionTokenizer
    from trainer.encoders import TextEncoder

    torch.manual_seed(0)
    tokenizer = CaptionTokenizer.clip()
    tower = TextEncoder(tokenizer.vocab_size, 77, 64, 2, 2, tokenizer.end_id).eval()
    model = type("Model", (), {"encode_text": staticmethod(tower)})
    templates = [t("{c}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    begin = time.perf_counter()
    other_DC = zero_shot_classifier(model, lambda texts: torch.from_numpy(tokenizer(texts)), open_clip.IMAGENET_CLASSNAMES,
                                    templates, "cpu", amp=False)
    their_seconds, begin = time.perf_counter() - begin, time.perf_counter()
    subject = Subject("t", Path(), "", "", "", torch.device("cpu"), lambda data: np.empty(0), lambda x: (x, x), tower,
                      tokenizer, 0, tower)
    own_CD = class_embeddings(lambda texts: embed_texts(subject, texts), open_clip.IMAGENET_CLASSNAMES, templates)
    our_seconds = time.perf_counter() - begin
    with capsys.disabled():
        print(f"\n1,000 classes x 80 templates: CLIP_benchmark {their_seconds:.1f} s, ours {our_seconds:.1f} s, "
              f"{their_seconds / our_seconds:.1f} times")
    torch.testing.assert_close(own_CD, other_DC.T, atol=1e-5, rtol=1e-4)
    assert their_seconds > 3 * our_seconds


def test_every_picture_is_seen_alike(run: Path, sets: dict[str, Path]) -> None:
    """What CLIP_benchmark hands to our transform and what our own reader sees is bit-equal."""
    import io

    from PIL import Image

    from trainer.embedder import transform_to

    subject = checkpoint_subject(run, "cpu")
    transform = transform_to(subject.model.image.size)  # type: ignore[union-attr,arg-type]
    for _, data, _ in list(open_evalset(sets["zeroshot"]).examples())[:9]:
        assert np.array_equal(transform(Image.open(io.BytesIO(data))).numpy(), subject.view(data))

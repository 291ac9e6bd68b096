"""An export is the checkpoint's model: the same features wherever it is opened, and a folder that tells where it is from."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, encoded, picture
from PIL import Image
from tiny import tiny_run

from evaluation.embed import embed_images, embed_texts
from evaluation.subject import checkpoint_subject
from pipeline.console import InputError, WorkFailed
from trainer import load, onnx_towers
from trainer.batches import IMAGE_BATCH
from trainer.export import CARD, DESCRIPTION, PREPROCESSOR, export, is_export
from trainer.onnx_towers import every_length

WORDS = ["a", "red", "circle", "is", "left", "of", "the", "large", "blue", "square", "and", "above", "one",
         "small", "green", "triangle"]


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run(scenes, tmp_path_factory.mktemp("exporting") / "run")
    done = command("uniclip-eval", "retrieval", folder, scenes / "evalsets" / "retrieval", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    pytest.importorskip("onnxruntime", reason="needs the extra `onnx`: pip install 'uniclip[onnx]'")
    done = command("uniclip-train", "export", run, run.parent / "model", "--onnx")
    assert done.returncode == 0, done.stderr
    assert "text.onnx: within" in done.stdout
    return run.parent / "model"


def files() -> list[bytes]:
    """As many pictures as evaluation has in a batch: rotated by EXIF, transparent, grey, 16 bit, of many shapes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = [encoded(picture(0), exif=exif), encoded(picture(1).convert("L")), encoded(picture(2).convert("RGBA"), "PNG"),
           encoded(picture(3).convert("P"), "PNG"),
           encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13), "PNG")]
    return odd + [encoded(picture(i, 40 + i, 90 - i)) for i in range(len(odd), IMAGE_BATCH)]


def test_features_are_those_of_the_checkpoint_bit_for_bit(run: Path, exported: Path) -> None:
    model, subject = load(exported), checkpoint_subject(run, "cpu")
    pictures = [Image.open(io.BytesIO(data)) for data in files()]
    (h_BW, z_BD), = embed_images(subject, [(run, str(i), data, None) for i, data in enumerate(files())])  # pyright: ignore
    assert np.array_equal(model.image_features(pictures).numpy(), h_BW)
    assert np.array_equal(model.encode_image(pictures).numpy(), z_BD)
    texts = [" ".join(WORDS[:n]) for n in range(len(WORDS))]
    z_text = model.encode_text(texts)
    assert torch.equal(z_text, subject.encode_text(torch.from_numpy(subject.tokenize(texts))))
    assert torch.allclose(z_text, embed_texts(subject, texts), atol=1e-5)
    assert torch.equal(model.model.text_head(model.text_features(texts)), z_text)


def test_evaluation_takes_an_export_for_its_checkpoint(run: Path, exported: Path, scenes: Path, tmp_path: Path) -> None:
    ours, theirs = checkpoint_subject(exported, "cpu"), checkpoint_subject(run, "cpu")
    assert torch.equal(embed_texts(ours, WORDS), embed_texts(theirs, WORDS))
    assert (ours.weights_sha256, ours.text_sha256, ours.transform) == (
        theirs.weights_sha256, theirs.text_sha256, theirs.transform)
    done = command("uniclip-eval", "retrieval", exported, scenes / "evalsets" / "retrieval", "--device", "cpu", "--out",
                   tmp_path / "results.jsonl")
    assert done.returncode == 0, done.stderr
    values = [[row["value"] for row in map(json.loads, path.read_text().splitlines())]
              for path in (tmp_path / "results.jsonl", run / "results.jsonl")]
    assert values[0] == values[1]


def test_inputs_come_in_every_form(exported: Path) -> None:
    model, image = load(exported).to("cpu"), picture(7)
    pixels = model.preprocess(image)
    assert torch.equal(model.encode_image(image), model.encode_image(pixels[None]))
    assert torch.equal(model.encode_text("a red circle"), model.encode_text(
        torch.from_numpy(model.tokenizer(["a red circle"]))))
    for feature in (model.encode_image(image, normalize=True), model.text_features("a", normalize=True)):
        assert torch.allclose(feature.norm(dim=1), torch.ones(1))
    assert not model.encode_image(image).requires_grad


@torch.no_grad()
def test_onnx_agrees_at_every_length_and_batch_size(exported: Path) -> None:
    import onnxruntime

    model = load(exported)
    texts = [" ".join(WORDS[:n]) for n in range(len(WORDS))] + ["red " * 60]
    lengths = (torch.from_numpy(model.tokenizer(texts)) != 0).sum(1)
    assert lengths.min() == 2
    assert lengths.max() == model.tokenizer.context
    tokens = torch.cat([every_length(model.tokenizer), torch.from_numpy(model.tokenizer(texts))])
    pixels = torch.stack([model.preprocess(picture(i)) for i in range(7)])
    for name, batch, encode, features in (("image", pixels, model.encode_image, model.image_features),
                                          ("text", tokens, model.encode_text, model.text_features)):
        session = onnxruntime.InferenceSession(exported / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for size in (1, 2, len(batch)):
            h, z = map(torch.as_tensor, session.run(None, {session.get_inputs()[0].name: batch[:size].numpy()}))
            assert torch.allclose(z, encode(batch[:size]), atol=1e-4)
            assert torch.allclose(h, features(batch[:size]), atol=1e-4)


def test_a_graph_that_disagrees_is_refused(tmp_path: Path) -> None:
    class Tower(torch.nn.Module):
        def forward(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x_BD * 2, x_BD * (2.001 if torch.compiler.is_compiling() else 2)

    with pytest.raises(WorkFailed, match="tower.onnx: z of 5 differs from torch by 5.0e-04"):
        onnx_towers._write(tmp_path / "tower.onnx", Tower(), "x", torch.ones(5, 3))


def test_the_card_tells_results_data_and_no_folder_of_ours(run: Path, exported: Path) -> None:
    card, description = (exported / CARD).read_text(), json.loads((exported / DESCRIPTION).read_text())
    assert card.startswith("---\nlibrary_name: uniclip\npipeline_tag: zero-shot-image-classification\nlicense: other\n")
    state = json.loads(next(run.glob("checkpoints/*48/state.json")).read_text())
    for said in (state["cursor"]["index"], description["sha256"]["model.safetensors"], "48 samples seen", "| 0.3 – 1.0 |"):
        assert said in card
    row = json.loads((run / "results.jsonl").read_text().splitlines()[0])
    assert f"| {row['dataset']} | test | retrieval | {row['metric']} | {100 * row['value']:.1f} %" in card
    for name in (CARD, DESCRIPTION):
        assert str(run.parent) not in (exported / name).read_text(), name
    assert description["config"]["run"]["folder"] == "run"


def test_transformers_reads_the_preprocessing(exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPImageProcessor.from_pretrained(exported)
    image = picture(5, 96, 96)
    pixels = torch.as_tensor(np.asarray(theirs(image, return_tensors="np")["pixel_values"][0]))
    assert (pixels - load(exported).preprocess(image)).abs().mean() < 0.02
    assert json.loads((exported / PREPROCESSOR).read_text())["crop_size"] == {"height": 48, "width": 48}


def test_other_folders_are_left_alone_and_exports_replaced(run: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CARD).write_text("mine")
    with pytest.raises(InputError, match="holds something else than an export"):
        export(run, tmp_path / "mine")
    assert (tmp_path / "mine" / CARD).read_text() == "mine"
    older = Path(shutil.copytree(exported, tmp_path / "older"))
    assert export(next(run.glob("checkpoints/*32")), older) == {}
    assert not list(older.glob("*.onnx"))
    assert load(older).loaded.weights_sha256 != load(exported).loaded.weights_sha256
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("name", "old", "new", "message"), [
    ("model.safetensors", b"", b"", "does not match the sha256"), ("tokenizer.json", b"<pad>", b"<pat>", "does not match"),
    (DESCRIPTION, b"uniclip-export/1", b"uniclip-export/9", "update uniclip"),
    (DESCRIPTION, b'"dim"', b'"dimm"', "is damaged")])
def test_damage_is_told(exported: Path, tmp_path: Path, name: str, old: bytes, new: bytes, message: str) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "damaged"))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data.replace(old, new, 1) if old else data[:-4] + b"\x01\x02\x03\x04")
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_hub_id_opens_what_the_cache_holds(exported: Path, tmp_path: Path) -> None:
    """The Hub's own cache layout and its offline mode: what a download would have left."""
    repository = tmp_path / "hub" / "models--someone--scenes"
    shutil.copytree(exported, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    code = ("from pathlib import Path\nfrom trainer import load\nfrom pipeline.console import InputError\n"
            "print(load('hf://someone/scenes').loaded.weights_sha256)\n"
            "print(load(Path('hf://someone/scenes@main')).loaded.weights_sha256)\n"
            "try: load('hf://someone/else')\nexcept InputError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""})
    first, second, error = done.stdout.splitlines()
    assert first == second == load(exported).loaded.weights_sha256
    assert error.startswith("hf://someone/else cannot be had")


def test_the_package_is_light_until_a_model_is_opened(exported: Path) -> None:
    code = ("import sys\nfrom trainer import load\nassert 'torch' not in sys.modules\n"
            f"load({str(exported)!r}).encode_text('a red circle')\n"
            "heavy = {'nvidia.dali', 'img2dataset', 'open_clip', 'pandas', 'pyarrow.parquet'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert is_export(exported)

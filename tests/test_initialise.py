"""Weights taken from elsewhere compute what they computed there, and what does not fit is refused by name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import command
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models._hub import save_for_hf
from tiny import tiny_run

from pipeline.console import InputError
from pipeline.schema import MEAN, STD
from pipeline.text import CaptionTokenizer
from trainer import load
from trainer.checkpoint import make_model
from trainer.config import InitConfig
from trainer.config_file import load_config
from trainer.export import export
from trainer.initialise import initialise
from trainer.model import UniCLIP

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
LIKE_CLIP = ["model.image.arch=vit_base_patch32_clip_224", "model.image.size=32", "model.image.patch=16",
             "model.image.width=64", "model.image.depth=2", "model.image.heads=2", "model.text.vocabulary=clip",
             "model.text.context=77", "model.text.width=32", "model.text.depth=2", "model.text.heads=2",
             "model.text.pooling=end", "model.dim=24", "model.head.kind=mlp", "model.head.depth=1",
             "model.head.augmentation=false"]


def model(*overrides: str, seed: int = 7) -> tuple[UniCLIP, CaptionTokenizer]:
    """A fresh model of open_clip's form, and its tokenizer."""
    config = load_config("scenes-tiny", [*LIKE_CLIP, *overrides])
    tokenizer = CaptionTokenizer.clip(config.model.text.context)
    torch.manual_seed(seed)
    return make_model(config, tokenizer).eval(), tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory):
    """open_clip models of random weights → folder with open_clip_config.json, model.pt, and the models by architecture."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "archs").mkdir()
    for arch, quick in (("init-test", False), ("init-test-quick", True)):
        (folder / "archs" / f"{arch}.json").write_text(json.dumps(
            {"embed_dim": 24, "quick_gelu": quick, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(folder / "archs")
    torch.manual_seed(0)
    theirs = open_clip.create_model("init-test").eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):  # zeros, else: a bias that is not taken would go unseen
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save(theirs.state_dict(), folder / "model.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, folder / "epoch_3.pt")
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD}
    (folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": json.loads((folder / "archs" / "init-test.json").read_text()), "preprocess_cfg": preprocess}))
    return folder, theirs


@pytest.mark.parametrize("form", ["{}/model.pt", "{}/epoch_3.pt", "{}/open_clip_model.safetensors", "init-test@{}/model.pt",
                                  "{}"])
@torch.no_grad()
def test_open_clip_towers_compute_what_they_did(clip, form: str) -> None:
    folder, theirs = clip
    what = f"open_clip:{form.format(folder)}"
    (ours, tokenizer), state = model(), torch.get_rng_state()
    lines = initialise(ours, tokenizer, InitConfig(image=what, text=what))
    assert torch.equal(torch.get_rng_state(), state), "what a run draws must not depend on where its weights come from"
    pixels = torch.randn(3, 3, 32, 32)
    tokens = torch.from_numpy(tokenizer(["a dog", "two black cats on a red sofa", ""]))
    assert (ours.encode_image(pixels) - theirs.encode_image(pixels)).abs().max() < 1e-5
    assert (ours.encode_text(tokens) - theirs.encode_text(tokens)).abs().max() < 1e-5
    assert "33 tensors taken (image, image_head)" in lines[0]
    assert "30 tensors taken (text, text_head)" in lines[1]
    assert lines[2] == "left fresh: 2 tensors (similarity)"
    assert ("does not tell its activation" in lines[0]) == (form not in ("{}", "init-test@{}/model.pt"))


@torch.no_grad()
def test_positions_are_fitted_and_heads_of_another_form_left(clip) -> None:
    folder, theirs = clip
    ours, tokenizer = model("model.image.size=48", "model.text.context=20", "model.head.kind=residual")
    fresh = ours.image_head.state_dict()["out.weight"].clone()
    lines = initialise(ours, tokenizer, InitConfig(image=f"open_clip:{folder}", text=f"open_clip:{folder}"))
    resized = resample_abs_pos_embed(theirs.visual.positional_embedding[None], [3, 3], num_prefix_tokens=1)
    assert torch.allclose(ours.image.vit.pos_embed, resized, atol=1e-6)
    assert "positions resized from 5 to 10" in lines[0]
    assert "positions cut from 77 to 20" in lines[1]
    assert "image_head" in lines[2]
    assert torch.equal(ours.image_head.state_dict()["out.weight"], fresh)
    texts = ["a dog", "a cat"]
    start, _ = model("model.text.pooling=start")
    assert "trained with pooling 'end'" in initialise(start, tokenizer, InitConfig(text=f"open_clip:{folder}/model.pt"))[0]
    tokens, full = torch.from_numpy(tokenizer(texts)), torch.from_numpy(CaptionTokenizer.clip(77)(texts))
    assert (ours.encode_text(tokens) - theirs.encode_text(full)).abs().max() < 1e-5


@pytest.mark.parametrize(("tower", "form", "override", "message"), [
    ("image", "init-test-quick@{}/model.pt", "", "activation of its image tower QuickGELU, of model.image GELU"),
    ("text", "init-test-quick@{}/model.pt", "", "activation of its text tower QuickGELU, of model.text GELU"),
    ("image", "{}", "model.image.heads=4", "attention heads of its image tower 2, of model.image 4: set model.image.heads"),
    ("text", "{}", "model.text.heads=4", "attention heads of its text tower 2, of model.text 4"),
    ("image", "{}", "model.image.depth=3", "has no image blocks.2.norm1.weight"),
    ("image", "{}", "model.image.depth=1", "its image blocks.1.norm1.weight has no place in model.image"),
    ("text", "{}", "model.text.width=64", "position is (77, 32) there and (77, 64) in model.text"),
    ("text", "{}", "model.text.context=80", "position is (77, 32) there and (80, 32)"),
    ("image", "{}", "model.image.patch=8", "its patches are (16, 16), ours (8, 8)"),
    ("image", "{}/model.pt", "model.image.arch=vit_tiny_patch16_224", "timm's vit_*_clip_* have it"),
    ("image", "{}/none.pt", "", "no such file or folder"),
    ("image", "{}/archs/init-test.json", "", "is JSON text, not weights"),
])
def test_what_differs_is_refused_by_name(clip, tower: str, form: str, override: str, message: str) -> None:
    ours, tokenizer = model(*filter(None, [override]))
    before = {name: x.clone() for name, x in ours.state_dict().items()}
    with pytest.raises(InputError) as caught:
        initialise(ours, tokenizer, InitConfig(**{tower: f"open_clip:{form.format(clip[0])}"}))
    assert message in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in ours.state_dict().items())


def test_a_vocabulary_of_another_kind_is_refused(clip) -> None:
    ours, _ = model()
    other = CaptionTokenizer.train(["a dog"] * 9, 300, 77)
    with pytest.raises(InputError, match="another vocabulary"):
        initialise(ours, other, InitConfig(text=f"open_clip:{clip[0]}"))


@torch.no_grad()
def test_a_timm_vit_sees_its_own_pixels_through_our_normalisation(tmp_path: Path) -> None:
    sizes: dict = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    theirs: Any = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    torch.nn.init.normal_(theirs.patch_embed.proj.bias, std=0.1)
    save_for_hf(theirs, str(tmp_path / "vit"), model_args=sizes, safe_serialization=True)
    ours, tokenizer = model("model.image.arch=vit_tiny_patch16_224")
    lines = initialise(ours, tokenizer, InitConfig(image=f"timm:local-dir:{tmp_path / 'vit'}"))
    image = torch.rand(2, 3, 32, 32)
    h_BW = theirs.forward_head(theirs.forward_features((image - 0.5) / 0.5), pre_logits=True)
    normalised = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert (ours.image_features(normalised) - h_BW).abs().max() < 1e-5
    assert "adapted to our pixels' mean and std" in lines[0]
    with pytest.raises(InputError, match=r"\[init\] timm:no_such_vit cannot be read"):
        initialise(ours, tokenizer, InitConfig(image="timm:no_such_vit"))
    with pytest.raises(InputError, match="has no text tower"):
        initialise(ours, tokenizer, InitConfig(text=f"timm:local-dir:{tmp_path / 'vit'}"))


def train(scenes: Path, folder: Path, *overrides: str, ranks: int = 1) -> list[dict]:
    """A run of three steps in processes of its own → its metrics."""
    words = ("run", "scenes-tiny", *(w for o in (
        f"data.index={scenes / 'train'}", f"run.folder={folder}", "data.executor=pillow", "optim.samples=48",
        "optim.batch_size=16", "optim.warmup_samples=0", "run.save_every_samples=32", "run.log_every=1", "run.device=cpu",
        "run.keep=9",
        "model.image.depth=1", "model.text.depth=1", "model.dim=32", *overrides) for w in ("--set", o)))
    program = Path(sys.executable).parent / "uniclip-train"
    launcher = ("torchrun", "--standalone", "--nproc-per-node", str(ranks), "--no-python") if ranks > 1 else ()
    done = command(*launcher, program, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(scenes, tmp_path_factory.mktemp("initial") / "run")


def weights(folder: Path, samples: int = 48) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{samples:012d}" / "model.safetensors")


def test_a_run_starts_from_one_of_ours_and_keeps_frozen_towers(scenes: Path, run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    export(run, exported)
    start = (f"init.image={exported}", f"init.text={exported}", "init.freeze=[\"image\"]", "run.seed=5")
    one = train(scenes, tmp_path / "one", *start, "optim.average_samples=64")
    two = train(scenes, tmp_path / "two", *start, ranks=2)
    first, last, source = weights(tmp_path / "one", 0), weights(tmp_path / "one"), weights(run)
    assert all(torch.equal(first[name], source[name]) for name in source), "all of it, similarity included"
    frozen = [name for name in source if name.startswith("image.")]
    assert all(torch.equal(last[name], source[name]) for name in frozen)
    assert not torch.equal(last["text.token.weight"], source["text.token.weight"])
    assert not torch.equal(last["image_head.out.weight"], source["image_head.out.weight"])
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in one], rel=1e-4)
    assert load(tmp_path / "one").tokenizer.to_json() == load(run).tokenizer.to_json()
    export(tmp_path / "one", tmp_path / "averaged")
    averaged = load_file(tmp_path / "averaged" / "model.safetensors")
    assert averaged.keys() == last.keys()
    assert not torch.equal(averaged["text.token.weight"], last["text.token.weight"])
    assert "averaged over 64 samples" in (tmp_path / "averaged" / "README.md").read_text()
    said = (tmp_path / "two" / "said.txt").read_text()
    assert said.count("tensors taken (text, text_head, similarity)") == 1


def test_resume_reads_no_other_weights_and_stays_frozen(scenes: Path, run: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "exported", tmp_path / "resumed"
    export(run, source)
    whole = train(scenes, folder, f"init.image={source}", "init.freeze=[\"image\"]")
    (folder / "checkpoints" / "latest").write_text("000000000032")
    source.rename(tmp_path / "gone")
    done = command("uniclip-train", "resume", folder)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        m["loss"] for m in whole]
    assert torch.equal(weights(folder)["image.vit.cls_token"], weights(run)["image.vit.cls_token"])


def test_frozen_random_weights_are_refused() -> None:
    with pytest.raises(InputError, match="would keep random weights: set init.image too"):
        load_config("scenes-tiny", ["init.freeze=[\"image\"]"])

"""Weights and checkpoints from anybody: loaded where that is safe, else one line. Nothing in them runs or asks the Hub."""

import argparse
import json
import os
import pickle
import shutil
import socket
import struct
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from conftest import command
from safetensors.torch import load_file, save, save_file
from tiny import tiny_run

from evaluation.subject import open_clip_subject
from pipeline.console import InputError
from pipeline.files import sha256_of
from pipeline.text import END
from trainer import load
from trainer.checkpoint import CONFIG, OPTIMIZER, STATE, TOKENIZER, WEIGHTS, find
from trainer.export import DESCRIPTION, export
from trainer.pretrained import read
from trainer.training import restored
from trainer.weights_file import read_weights

TINY = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
POOLING = {"attentional_pool": True, "attn_pooler_heads": 2}


class Code:
    """Writes a file when it is unpickled by a careless reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Dear:
    """As `Code`, under a name that torch has no list of."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return shutil.rmtree, (str(self.path), True)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(host: str, *_: object, **__: object):
        raise AssertionError(f"looked up {host}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    import open_clip

    folder = tmp_path_factory.mktemp("archs")
    (folder / "foreign-tiny.json").write_text(json.dumps(TINY))
    coca = TINY | {"custom_text": True, "multimodal_cfg": TINY["text_cfg"] | {"attn_pooler_heads": 2},
                   "vision_cfg": TINY["vision_cfg"] | POOLING | {"output_tokens": True},
                   "text_cfg": TINY["text_cfg"] | {"embed_cls": True, "output_tokens": True}}
    (folder / "foreign-coca.json").write_text(json.dumps(coca))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    return open_clip.create_model("foreign-tiny").state_dict()


def saved(value: object, legacy: bool = False) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path, _use_new_zipfile_serialization=not legacy)


SETTINGS = {"args": argparse.Namespace(lr=1e-3, out=Path("x")), "best": np.float64(3), "history": np.arange(9)}
WRAPPED = {
    "slip's, with a Namespace": lambda w: {"epoch": 3, "state_dict": {f"module.{k}": x for k, x in w.items()}, **SETTINGS},
    "inside model": lambda w: {"model": w, "optimizer": {"state": {}}},
    "inside module, twice wrapped": lambda w: {"module": {f"module._orig_mod.{k}": x for k, x in w.items()}},
    "openai's, with sizes among them": lambda w: w | {"input_resolution": torch.tensor(32), "vocab_size": torch.tensor(49408)},
    "model_state_dict, with its loss": lambda w: {"model_state_dict": w, "loss": np.float32(2)},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", WRAPPED)
def test_weights_are_found_wherever_they_lie(tiny, tmp_path: Path, form: str, legacy: bool) -> None:
    path = tmp_path / "weights.pt"
    saved(WRAPPED[form](tiny), legacy)(path)
    found = read_weights(path)
    assert found.keys() == tiny.keys()
    assert all(torch.equal(found[name], x) for name, x in tiny.items())
    pixels = torch.rand(2, 3, 32, 32)
    want = open_clip_model(tiny).encode_image(pixels)
    torch.testing.assert_close(open_clip_subject("foreign-tiny", path, "cpu").encode_image(pixels)[1], want)


def open_clip_model(weights: dict[str, torch.Tensor], arch: str = "foreign-tiny"):
    import open_clip

    model = open_clip.create_model(arch).eval()
    model.load_state_dict(weights)
    return model


def test_safetensors_under_another_name_are_read(tiny, tmp_path: Path) -> None:
    save_file(tiny, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path / "pytorch_model.bin").keys() == tiny.keys()


def test_coca_gives_what_its_encode_image_gives(tiny, tmp_path: Path) -> None:
    import open_clip

    model = open_clip.create_model("foreign-coca").eval()
    torch.save(model.state_dict(), tmp_path / "coca.pt")
    subject, pixels = open_clip_subject("foreign-coca", tmp_path / "coca.pt", "cpu"), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(subject.encode_image(pixels)[1], model.encode_image(pixels))
    tokens = torch.as_tensor(subject.tokenize(["a cat", "two dogs"]))
    torch.testing.assert_close(subject.encode_text(tokens), model.encode_text(tokens))


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def cut(part: float, kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        whole = {"a": torch.rand(5000)}
        save_file(whole, path) if kind == "safetensors" else torch.save(whole, path)
        data = path.read_bytes()
        path.write_bytes(data[:int(len(data) * part)])

    return write


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(10_000_000))


def text(told: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(told) and None


NO_WEIGHTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "lfs pointer": ("a.pt", text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"), "git lfs pull"),
    "lfs pointer called safetensors": ("a.safetensors", text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "login page": ("a.bin", text("\n<!DOCTYPE html><html>401</html>"), "is a web page"),
    "page": ("a.pt", text("<HTML>"), "is a web page"), "bucket's answer": ("a.pt", text("<?xml version='1'?><Error>"), "XML"),
    "json": ("a.pt", text('{"error": "not found"}'), "is JSON text"), "empty": ("a.pt", text(""), "is empty"),
    "words": ("a.pt", text("Not Found"), "no whole file of torch.save"),
    "TorchScript": ("a.pt", script, r"TorchScript program.*torch.jit.load\('a.pt'\)"),
    "cut safetensors": ("a.safetensors", cut(0.7, "safetensors"), "cut short or damaged.*download it again"),
    "safetensors cut in its header": ("a.safetensors", cut(0.001, "safetensors"), "cut short or damaged"),
    "cut zip": ("a.pt", cut(0.7, "torch"), "no whole file of torch.save.*download it again"),
    "code in os": ("a.pt", saved({"state_dict": {}, "x": Code(Path("ran"))}), "holds (posix|os).mkdir, which is code"),
    "code": ("a.pt", saved({"state_dict": {}, "x": Dear(Path("kept"))}), "holds shutil.rmtree, which is code"),
    "code in a legacy file": ("a.pt", saved({"x": Dear(Path("kept"))}, legacy=True), "holds shutil.rmtree, which is code"),
    "a whole module": ("a.pt", saved(torch.nn.Linear(2, 2)), "holds torch.nn.modules.linear.Linear, which is code"),
    "plain pickle": ("a.pt", lambda path: path.write_bytes(pickle.dumps({"a": 1})) and None, "no whole file of torch.save"),
    "no weights": ("a.pt", saved({"epoch": 3, "lr": 0.1}), "holds no weights by name .found: epoch, lr"),
    "a list": ("a.pt", saved([torch.zeros(3)]), "holds no weights by name .found: list"),
    "another zip": ("a.pt", lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "zip archive without weights"),
    "zip bomb": ("a.pt", bomb, "unpacks to more than it holds"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weights_file_is_one_line_with_a_cure(tmp_path: Path, monkeypatch, kind: str) -> None:
    name, write, message = NO_WEIGHTS[kind]
    monkeypatch.chdir(tmp_path)
    Path("kept").mkdir()
    write(Path(name))
    with pytest.raises(InputError, match=message) as caught:
        read_weights(Path(name))
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)
    assert Path("kept").exists()
    assert not Path("ran").exists()


@pytest.mark.parametrize("named", [("vision_cfg", "timm_model_name", "hf-hub:evil/tower"),
                                   ("text_cfg", "hf_model_name", "evil/text")])
def test_a_folder_of_open_clip_cannot_name_the_hub(tmp_path: Path, named: tuple[str, str, str]) -> None:
    section, key, value = named
    config = TINY | {section: TINY[section] | {key: value}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with pytest.raises(InputError, match=f"names '{value}' for one of its towers"):
        read(f"open_clip:{tmp_path}")


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(scenes, tmp_path_factory.mktemp("foreign") / "run", samples=32)


def unsealed(path: Path) -> dict:
    told = json.loads(path.read_text())
    told.pop("crc32", None)
    return told


def hashed(folder: Path) -> None:
    """Write the right hashes into state.json, as an attacker would."""
    told = unsealed(folder / STATE)
    told["hashes"] = {name: sha256_of(folder / name) for name in told["hashes"] if (folder / name).is_file()}
    (folder / STATE).write_text(json.dumps(told))


def config(**changes: object) -> Callable[[Path], None]:
    def craft(folder: Path) -> None:
        told = tomllib.loads((folder / CONFIG).read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            section = told
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        (folder / CONFIG).write_text(tomli_w.dumps(told))

    return craft


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def craft(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return craft


def vocabulary(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def craft(folder: Path) -> None:
        told = json.loads((folder / TOKENIZER).read_text())
        change(told)
        (folder / TOKENIZER).write_text(json.dumps(told))

    return craft


def optimizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def craft(folder: Path) -> None:
        told = torch.load(folder / OPTIMIZER, weights_only=True)
        torch.save(change(told) or told, folder / OPTIMIZER)

    return craft


def state(**changes: object) -> Callable[[Path], None]:
    def craft(folder: Path) -> None:
        told = unsealed(folder / STATE)
        (folder / STATE).write_text(json.dumps(told | changes))

    return craft


def raw(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def header(told: dict, data: bytes = b"") -> bytes:
    head = json.dumps(told).encode()
    return struct.pack("<Q", len(head)) + head + data


def first(told: dict) -> dict:
    return next(iter(told["optimizer"]["state"].values()))


HUB = {f"config names {arch}": config(model__image__arch=arch) for arch in
       ("hf-hub:evil/vit", "hf_hub:evil/vit", "timm/vit_tiny_patch16_224.evil", "local-dir:/tmp")}
OPENED: dict[str, Callable[[Path], None]] = HUB | {
    "config asks for 10^9 blocks": config(model__text__depth=10**9),
    "config asks for a width of 10^8": config(model__text__width=10**8),
    "config asks for pictures of 10^9 pixels": config(model__image__size=10**9),
    "config asks for a context of 10^12": config(model__text__context=10**12),
    "config asks for no architecture": config(model__image__arch="resnet18"),
    "config nests deeply": raw(CONFIG, b"a = " + b"[" * 100_000),
    "config has a huge number": raw(CONFIG, b"a = " + b"9" * 9999),
    "config is no text": raw(CONFIG, b"\xff\xfe"),
    "safetensors has a header of 2^62": raw(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
    "safetensors has offsets outside": raw(WEIGHTS, header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}})),
    "safetensors has a shape of 2^63": raw(WEIGHTS, header({"a": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]}},
                                                          b"1234")),
    "safetensors has an unknown type": raw(WEIGHTS, header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
                                                          b"1234")),
    "safetensors is a pickle": lambda folder: torch.save({"a": Code(folder / "ran")}, folder / WEIGHTS),
    "safetensors is empty": raw(WEIGHTS, save({})),
    "a tensor has another shape": tensors(lambda w: w.update({"text.norm.weight": torch.zeros(3)})),
    "a tensor is of integers": tensors(lambda w: w.update({"text.norm.weight": w["text.norm.weight"].long()})),
    "a tensor too many": tensors(lambda w: w.update({"evil\nname": torch.zeros(3)})),
    "a tensor is missing": tensors(lambda w: w.pop("text.norm.weight")),
    "tokenizer is no JSON": raw(TOKENIZER, b"{"), "tokenizer is no text": raw(TOKENIZER, b"\xff\xfe\x00"),
    "tokenizer nests deeply": raw(TOKENIZER, b"[" * 100_000),
    "tokenizer skips ids": vocabulary(lambda t: t["model"]["vocab"].update(evil=10**9)),
    "tokenizer lacks its end": vocabulary(lambda t: (t["added_tokens"].clear(), t["model"]["vocab"].update(
        x=t["model"]["vocab"].pop(END)))),
    "tokenizer has a costly pattern": vocabulary(lambda t: t.update(pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False})),
    "tokenizer pads to 10^9": vocabulary(lambda t: t.update(padding={
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x"})),
    "tokenizer is of another kind": vocabulary(lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0},
                                                                        "unk_token": "x"})),
    "state is a list": raw(STATE, b"[]"), "state nests deeply": raw(STATE, b"[" * 100_000),
    "state has words for numbers": state(step="1"), "state counts backwards": state(step=-1),
    "state has no hashes": state(hashes={}), "state has a list of hashes": state(hashes=["a"]),
    "state names a file elsewhere": state(hashes=dict.fromkeys((WEIGHTS, OPTIMIZER, TOKENIZER, CONFIG), "0") | {
        "../../../../../../etc/passwd": "0"}),
}
RESUMED: dict[str, Callable[[Path], None]] = {
    "optimizer holds code": lambda folder: torch.save({"optimizer": Code(folder / "ran")}, folder / OPTIMIZER),
    "optimizer holds other code": lambda folder: torch.save({"optimizer": Dear(folder)}, folder / OPTIMIZER),
    "optimizer is no pickle": raw(OPTIMIZER, b"abc"), "optimizer is empty": raw(OPTIMIZER, b""),
    "optimizer is a list": optimizer(lambda o: [1]),
    "optimizer has no random state": optimizer(lambda o: {"optimizer": o["optimizer"]}),
    "random state is short": optimizer(lambda o: o.update(rng=torch.zeros(3, dtype=torch.uint8))),
    "random state is of floats": optimizer(lambda o: o.update(rng=torch.zeros(5056))),
    "moments have other shapes": optimizer(lambda o: first(o).update(exp_avg=torch.zeros(1))),
    "moments are words": optimizer(lambda o: first(o).update(exp_avg="a")),
    "groups learn otherwise": optimizer(lambda o: o["optimizer"]["param_groups"][0].update(weight_decay=9e9)),
    "groups are missing": optimizer(lambda o: o["optimizer"].pop("param_groups").clear()),
    "groups name other parameters": optimizer(lambda o: o["optimizer"]["param_groups"][0].update(params=["evil"])),
    "memory of no buffer": optimizer(lambda o: o.update(memory={"evil": torch.zeros(3)})),
}


def test_a_checkpoint_of_ours_is_opened_and_resumed(run: Path) -> None:
    hashed(find(run))
    assert load(run).loaded.folder == find(run)
    assert restored(run, "cpu")[1].step == 2


@pytest.mark.parametrize("how", [*OPENED, *RESUMED])
def test_a_crafted_checkpoint_is_one_line(run: Path, tmp_path: Path, how: str) -> None:
    crafted = Path(shutil.copytree(run, tmp_path / "run"))
    folder = find(crafted)
    (OPENED | RESUMED)[how](folder)
    if not how.startswith("state"):
        hashed(folder)
    with pytest.raises(InputError) as caught:
        load(crafted) if how in OPENED else restored(crafted, "cpu")
    told = str(caught.value)
    assert "\n" not in told and len(told) < 700, told
    assert str(tmp_path) in told or "[model]" in told, told
    assert not list(tmp_path.rglob("ran"))
    assert (folder / WEIGHTS).exists()


@pytest.mark.parametrize("change", [
    {"config": {"model": {"image": {"arch": "hf-hub:evil/vit"}}}}, {"sha256": []}, {"sha256": {}}, {"config": []},
    {"config": {"model": {"text": {"context": 10**12}}}}, {"tokenizer": "a"}, {"format": "uniclip-export/\x1b[2J"}],
    ids=lambda change: json.dumps(change)[:40])
def test_a_crafted_export_is_one_line(run: Path, tmp_path: Path, change: dict) -> None:
    export(run, tmp_path / "model")
    told = unsealed(tmp_path / "model" / DESCRIPTION)
    (tmp_path / "model" / DESCRIPTION).write_text(json.dumps(merged(told, change)))
    if "tokenizer" in change:  # what is said of it beside the file is not believed
        assert load(tmp_path / "model").loaded.tokenizer.context == load(run).loaded.tokenizer.context
        return
    with pytest.raises(InputError) as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def merged(told: dict, change: dict) -> dict:
    return told | {name: merged(told[name], value) if isinstance(value, dict) and value and name in told else value
                   for name, value in change.items()}


def test_a_command_on_a_crafted_run_ends_with_one_line_and_exit_code_2(run: Path, tmp_path: Path) -> None:
    crafted = Path(shutil.copytree(run, tmp_path / "run"))
    HUB["config names hf-hub:evil/vit"](find(crafted))
    hashed(find(crafted))
    done = command("uniclip-train", "resume", crafted)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "'hf-hub:evil/vit' is no architecture of timm" in done.stderr

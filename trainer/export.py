"""A trained model as a folder that others can open, in the layout of the Hugging Face Hub.

    model.safetensors  tokenizer.json  preprocessor_config.json  README.md  [image.onnx  text.onnx]  config.json

config.json, put in place last, says what the others are: the configuration without paths, their sha256, where they come from.
"""

import json
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, FileSystemLoader
from pydantic import ValidationError

from pipeline.console import InputError
from pipeline.files import sha256_of, write_json
from pipeline.markup import markdown
from pipeline.schema import MEAN, STD, VECTOR
from pipeline.seals import read_lines
from pipeline.versions import versions
from trainer.checkpoint import TOKENIZER, WEIGHTS, Loaded, State, assemble, load_model, read_state
from trainer.config import Config
from trainer.onnx_towers import write_onnx

DESCRIPTION, PREPROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
FORMAT = "uniclip-export/1"
NEEDED = (DESCRIPTION, WEIGHTS, TOKENIZER)
_HUB = re.compile(r"hf:/+([^/@]+/[^/@]+)(?:@(.+))?")  # a Path of hf://a/b has one slash
_FOLDERS = re.compile(r"(^|(?<=:))([a-z0-9+.-]+:/)?/([^/]*/)*")


def export(source: Path, folder: Path, onnx: bool = False) -> dict[str, float]:
    """Write the model of a run or checkpoint folder into `folder` → ONNX file → its largest difference from torch.

    An older export there is replaced. Raises InputError when there is no checkpoint, or the folder holds something else.
    """
    _refuse_others(folder)
    loaded = load_model(source)
    state = read_state(loaded.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        new = Path(made)
        weights = next(name for name, sha256 in state.hashes.items() if sha256 == loaded.weights_sha256)
        shutil.copyfile(loaded.folder / weights, new / WEIGHTS)
        shutil.copyfile(loaded.folder / TOKENIZER, new / TOKENIZER)
        write_json(new / PREPROCESSOR, preprocessing(loaded.image_size))
        differences = write_onnx(loaded.model, loaded.image_size, loaded.tokenizer, new) if onnx else {}
        description = _description(loaded, state, {path.name: sha256_of(path) for path in sorted(new.iterdir())})
        (new / CARD).write_text(_card(folder.absolute().name, loaded, description, differences), encoding="utf-8")
        write_json(new / DESCRIPTION, description)
        _put(new, folder)
    return differences


def _refuse_others(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a new folder, or one that holds an older export")
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise InputError(f"{folder} holds something else than an export: give a new folder, or an empty one")


def is_export(folder: Path) -> bool:
    """Whether the folder's config.json says so."""
    try:
        return json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["format"].startswith("uniclip-export/")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _put(new: Path, folder: Path) -> None:
    """The new files into the folder, config.json last; graphs of an older export go."""
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.onnx*"):
        stale.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == DESCRIPTION):
        path.replace(folder / path.name)


def preprocessing(size: int) -> dict[str, Any]:
    """What turns a picture into pixels, as `transformers` writes it."""
    return {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
            "size": {"shortest_edge": size}, "resample": 3, "do_center_crop": True,
            "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)}


def _description(loaded: Loaded, state: State, sha256: dict[str, str]) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    return {"format": FORMAT, "model_type": "uniclip", "config": _without_folders(loaded.config.model_dump(mode="json")),
            "tokenizer": {"context": tokenizer.context, "start_id": tokenizer.start_id, "end_id": tokenizer.end_id,
                          "vocab_size": tokenizer.vocab_size},
            "augmentation_vector": [field.name for field in VECTOR], "samples_seen": state.cursor.samples_seen,
            "data": asdict(state.cursor), "sha256": sha256, "exported_by": versions()}


def _without_folders(value: Any) -> Any:
    """Absolute paths and URLs → their last part: where things lay on one's machine is nobody's business."""
    if isinstance(value, dict):
        return {name: _without_folders(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _card(name: str, loaded: Loaded, description: dict[str, Any], differences: dict[str, float]) -> str:
    results = loaded.run / "results.jsonl"
    rows = [row for row in read_lines(results, "remove the line, and measure it again")
            if row.get("weights_sha256") == loaded.weights_sha256]
    kinds = [vars(kind) for kind in loaded.config.data.kinds()]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    environment.filters["md"] = markdown
    return environment.get_template("model_card.md.jinja").render(
        name=name, rows=rows, kinds=kinds, differences=differences, d=description, c=loaded.config,
        weights=sum(p.numel() for p in loaded.model.parameters()), configuration=tomli_w.dumps(description["config"]))


def open_model(source: str | Path, device: str = "cpu") -> Loaded:
    """The model of an export, run or checkpoint folder, or of hf://ORG/NAME[@REVISION]; in evaluation mode.

    Raises InputError when there is none or it is damaged.
    """
    hub = _HUB.fullmatch(str(source))
    folder = _snapshot(*hub.groups()) if hub else Path(source)
    return _opened(folder, device) if is_export(folder) else load_model(folder, device)


def _snapshot(repository: str, revision: str | None) -> Path:
    """The folder of a Hub repository, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(NEEDED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"hf://{repository} cannot be had: {reason}: check its name, or give a local folder") from None


def _opened(folder: Path, device: str) -> Loaded:
    """An export folder, with its files' hashes verified."""
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))  # is_export has read it
    if description["format"] != FORMAT:
        raise InputError(f"{folder} is of format {description['format']!r}, this version reads {FORMAT}: update uniclip")
    try:
        sha256 = description["sha256"]
        for name in (WEIGHTS, TOKENIZER):
            if not (folder / name).is_file() or sha256_of(folder / name) != sha256[name]:
                raise InputError(f"{folder / name} is missing or does not match the sha256 in {DESCRIPTION}: export it again")
        config = Config.model_validate(description["config"])
    except (KeyError, TypeError, ValidationError) as error:
        raise InputError(f"{folder / DESCRIPTION} is damaged ({str(error).partition(chr(10))[0]}): export it again") from None
    model, tokenizer = assemble(config, folder / WEIGHTS, DESCRIPTION)
    return Loaded(model.eval().to(device), tokenizer, config.model.image.size, config, sha256[WEIGHTS], folder, folder)

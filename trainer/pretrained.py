"""Weights of timm, of open_clip and of ourselves, read for a model of ours to start from.

Nothing in them runs, see trainer.weights_file. The Hub is asked for what the user names, never for what a file names.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.console import InputError
from pipeline.schema import MEAN, STD
from pipeline.text import CaptionTokenizer
from trainer.export import open_model
from trainer.weights_file import Weights, read_weights

Traits = dict[str, Any]
ACTIVATION, HEADS, EPSILON = "activation", "attention heads", "ε of the norms"
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_TEXT_NAMES = (("token_embedding", "token"), ("positional_embedding", "position"), ("transformer.resblocks.", "blocks."),
               ("ln_final", "norm"), ("ln_", "norm"), ("attn.in_proj_", "attn.qkv."), ("attn.out_proj", "attn.proj"),
               ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"))


@dataclass(frozen=True)
class Pretrained:
    """Weights by tower and head.

    image: names that timm's ViTs load; text: those of TextEncoder; heads: those of UniCLIP. traits: tower → what shapes do not
    tell, empty when unknown. pooling: of the text tower. pixels: mean and std of the images it was trained on. tokenizer: its
    file.
    """

    image: Weights = field(default_factory=dict)
    text: Weights = field(default_factory=dict)
    heads: Weights = field(default_factory=dict)
    traits: dict[str, Traits] = field(default_factory=dict)
    pooling: str = "end"
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = (MEAN, STD)
    tokenizer: str = ""


def read(what: str) -> Pretrained:
    """"timm:NAME", "open_clip:WHAT", or a run, checkpoint or export folder. Raises InputError when it cannot be read."""
    kind, _, name = what.partition(":")
    reader = {"timm": _timm, "open_clip": _open_clip}.get(kind)
    try:
        return reader(name) if reader else _ours(what)
    except InputError:
        raise
    except Exception as error:  # the two libraries, the Hub's client and torch.load have dozens
        raise InputError(f"[init] {what} cannot be read: {str(error).partition(chr(10))[0] or type(error).__name__}") from error


def traits_of(*modules: nn.Module) -> Traits:
    """What the shapes of a tower's weights do not tell: activation, attention heads, ε of the norms."""
    named: list[tuple[str, Any]] = [pair for module in modules for pair in module.named_modules()]
    return {ACTIVATION: sorted({type(m).__name__ for name, m in named if name.rpartition(".")[2] in ("act", "gelu")}),
            HEADS: sorted({m.num_heads for _, m in named if isinstance(getattr(m, "num_heads", None), int)}),
            EPSILON: sorted({m.eps for _, m in named if isinstance(m, nn.LayerNorm)})}


def taken_tokenizer(what: str, context: int) -> CaptionTokenizer | None:
    """The vocabulary that comes with the text tower of one of our models; None for others. Raises InputError."""
    if not what or what.startswith("open_clip:"):
        return None
    return CaptionTokenizer.from_json(open_model(what).tokenizer.to_json(), context)


def _timm(name: str) -> Pretrained:
    model = timm.create_model(name, pretrained=True, num_classes=0)
    if not isinstance(model, VisionTransformer):
        raise InputError(f"[init] timm:{name} is no VisionTransformer: choose one of timm.list_models('vit_*')")
    cfg: Any = model.pretrained_cfg
    return Pretrained(model.state_dict(), traits={"image": traits_of(model)}, pixels=(tuple(cfg["mean"]), tuple(cfg["std"])))


def _ours(path: str) -> Pretrained:
    loaded = open_model(path)
    weights = loaded.model.state_dict()
    image, text = _below("image.vit.", weights), _below("text.", weights)
    heads = {name: x for name, x in weights.items() if not name.startswith(("image.", "text."))}
    return Pretrained(image, text, heads, {"image": traits_of(loaded.model.image), "text": traits_of(loaded.model.text)},
                      loaded.model.text.pooling, tokenizer=loaded.tokenizer.to_json())


def _below(prefix: str, weights: Weights) -> Weights:
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def _open_clip(what: str) -> Pretrained:
    """A weights file, ARCHITECTURE@FILE, a folder with open_clip_config.json, or hf-hub:ORG/NAME.

    Only a bare file does not tell what it was: it has no traits.
    """
    if Path(what).is_file():
        return _from_open_clip(read_weights(Path(what)), {}, "end", (MEAN, STD))
    model = _open_clip_model(what)
    custom = hasattr(model, "text")
    text = [model.text] if custom else [model.transformer, model.ln_final]
    pool, mask = (model.text.pool_type, model.text.attn_mask) if custom else (model.text_pool_type, model.attn_mask)
    causal = mask is not None
    pooling = "end" if causal and pool in ("argmax", "eos") else f"{pool}, {'' if causal else 'not '}causal"
    traits = {"image": traits_of(model.visual), "text": traits_of(*text)}
    return _from_open_clip(model.state_dict(), traits, pooling, (tuple(model.visual.image_mean), tuple(model.visual.image_std)))


def _open_clip_model(what: str) -> Any:
    from open_clip import create_model
    from open_clip.factory import download_pretrained_from_hf

    arch, _, file = what.partition("@")
    with read_by_us():
        if Path(what).is_dir():
            _refuse_hub_names(Path(what) / _OPEN_CLIP_CONFIG)
            return create_model(f"local-dir:{what}")
        if what.startswith("hf-hub:"):
            _refuse_hub_names(Path(download_pretrained_from_hf(what.removeprefix("hf-hub:"), filename=_OPEN_CLIP_CONFIG)))
            return create_model(what)
        if file:
            return create_model(arch, pretrained=file)
    raise InputError(f"[init] open_clip:{what}: no such file or folder; ARCHITECTURE@FILE and hf-hub:ORG/NAME are others")


@contextmanager
def read_by_us() -> Iterator[None]:
    """Within, open_clip reads weights files as `read_weights` does: its own reader ends in tracebacks of many kinds."""
    from open_clip import factory

    theirs, factory.load_state_dict = factory.load_state_dict, lambda path, *_, **__: read_weights(Path(path))
    try:
        yield
    finally:
        factory.load_state_dict = theirs


def _refuse_hub_names(path: Path) -> None:
    """Raises InputError where a configuration names a further model that timm or transformers would ask the Hub for."""
    config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    image, text = (config[name].get(key) for name, key in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name")))
    if text or image and not timm.is_model(image):
        raise InputError(f"{path} names {text or image!r} for one of its towers: only architectures that timm and open_clip "
                         "carry are built from a file, and no Hub repository is asked for one that a file names")


def _from_open_clip(weights: Weights, traits: dict[str, Traits], pooling: str, pixels: tuple) -> Pretrained:
    """timm reads open_clip's image towers itself; the text tower and the projections get our names here."""
    image = {name: x for name, x in weights.items() if name.startswith("visual.")}
    texts = {name.removeprefix("text."): x for name, x in weights.items()
             if not name.startswith(("visual.", "logit_")) and not name.endswith("attn_mask")}
    heads = dict(_projection("image_head.layers.0", image.pop("visual.proj", None)))
    matrix = texts.pop("text_projection", None)
    heads |= _projection("text_head", matrix)
    return Pretrained(image, {_text_name(name): x for name, x in texts.items()}, heads, traits, pooling, pixels,
                      CaptionTokenizer.clip().to_json())


def _projection(name: str, matrix_WD: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    if matrix_WD is not None:
        yield f"{name}.weight", matrix_WD.T.contiguous()
        yield f"{name}.bias", matrix_WD.new_zeros(matrix_WD.shape[1])


def _text_name(name: str) -> str:
    for theirs, ours in _TEXT_NAMES:
        name = name.replace(theirs, ours)
    return name

"""Weights of timm, of open_clip and of ourselves, read for a model of ours to start from.

Nothing is unpickled: safetensors, or torch.load with weights_only.
"""

from collections.abc import Iterator
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

Weights = dict[str, Tensor]
Traits = dict[str, Any]
ACTIVATION, HEADS, EPSILON = "activation", "attention heads", "ε of the norms"
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
    from open_clip import create_model
    from open_clip.factory import load_state_dict

    arch, _, file = what.partition("@")
    if Path(what).is_file():
        weights: Any = load_state_dict(what, weights_only=True)
        return _from_open_clip(weights, {}, "end", (MEAN, STD))
    if Path(what).is_dir():
        model: Any = create_model(f"local-dir:{what}")
    elif file:
        model = create_model(arch, pretrained=file)
    elif what.startswith("hf-hub:"):
        model = create_model(what)
    else:
        raise InputError(f"[init] open_clip:{what}: no such file or folder; ARCHITECTURE@FILE and hf-hub:ORG/NAME are others")
    custom = hasattr(model, "text")
    text = [model.text] if custom else [model.transformer, model.ln_final]
    pool, mask = (model.text.pool_type, model.text.attn_mask) if custom else (model.text_pool_type, model.attn_mask)
    causal = mask is not None
    pooling = "end" if causal and pool in ("argmax", "eos") else f"{pool}, {'' if causal else 'not '}causal"
    traits = {"image": traits_of(model.visual), "text": traits_of(*text)}
    return _from_open_clip(model.state_dict(), traits, pooling, (tuple(model.visual.image_mean), tuple(model.visual.image_std)))


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

"""Weights that a fresh run starts from, and towers that stay as they are. `resume` has nothing to do with it.

A tower is taken whole or not at all: the first name, shape or trait that differs is an error. A head is taken where it fits.
"""

import math

import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from pipeline.console import InputError
from pipeline.schema import MEAN, STD
from pipeline.text import CaptionTokenizer
from trainer.config import InitConfig
from trainer.model import UniCLIP
from trainer.pretrained import ACTIVATION, EPSILON, HEADS, Pretrained, Weights, read, traits_of

HEADS_OF = {"image": ("image_head", "augmentation"), "text": ("text_head",)}


def freeze(model: UniCLIP, config: InitConfig) -> None:
    """Switch off the gradients of the towers that `freeze` names; before the optimizer is made."""
    for tower in config.freeze:
        model.get_submodule(tower).requires_grad_(False)


@torch.no_grad()
def initialise(model: UniCLIP, tokenizer: CaptionTokenizer, config: InitConfig) -> list[str]:
    """Copy the weights that [init] names into `model` → lines that say what was taken, resized, left fresh.

    Raises InputError naming the first thing that does not fit.
    """
    with torch.random.fork_rng(devices=[]):  # building their models draws random numbers
        sources = {what: read(what) for what in dict.fromkeys((config.image, config.text)) if what}
    taken: Weights = {}
    lines = []
    for tower, what in (("image", config.image), ("text", config.text)):
        if what:
            weights, notes = _image(model, sources[what], what) if tower == "image" else \
                _text(model, tokenizer, sources[what], what)
            heads = [part for part in HEADS_OF[tower] if _take_head(model, sources[what], part, weights)]
            if tower == "text" and config.image == what and _take_head(model, sources[what], "similarity", weights):
                heads.append("similarity")
            taken |= weights
            lines.append(f"init.{tower} {what}: {len(weights)} tensors taken ({', '.join((tower, *heads))})"
                         + "".join(f"; {note}" for note in notes))
    if taken:
        model.load_state_dict(taken, strict=False)
        fresh = [name for name in model.state_dict() if name not in taken]
        parts = dict.fromkeys(name.partition(".")[0] for name in fresh)
        lines.append(f"left fresh: {len(fresh)} tensors" + (f" ({', '.join(parts)})" if fresh else ""))
    return lines


def _image(model: UniCLIP, source: Pretrained, what: str) -> tuple[Weights, list[str]]:
    vit = model.image.vit
    if not source.image:
        raise InputError(f"[init] {what} has no image tower that timm reads: its names begin otherwise than visual.")
    notes = _same_traits("image", source, what, vit)
    kernel, positions = (next((x for name, x in source.image.items() if name.endswith(ends)), None) for ends in
                         (("patch_embed.proj.weight", "visual.conv1.weight"), ("pos_embed", "visual.positional_embedding")))
    patch = vit.patch_embed.proj.weight
    if kernel is not None and kernel.shape[-2:] != patch.shape[-2:]:
        raise InputError(f"[init] {what}: its patches are {tuple(kernel.shape[-2:])}, ours {tuple(patch.shape[-2:])}: set "
                         "model.image.patch")
    if positions is not None and math.isqrt(count := positions.numel() // positions.shape[-1] - 1) ** 2 != count:
        raise InputError(f"[init] {what}: its {count + 1} positions are not a class token's and a square's")
    weights = {name: x for name, x in checkpoint_filter_fn(dict(source.image), vit).items() if not name.startswith("head.")}
    hint = ""
    if ("norm_pre.weight" in weights) != ("norm_pre.weight" in vit.state_dict()):
        hint = "; one has a norm before its first block and the other has not: timm's vit_*_clip_* have it"
    _same_shapes("image", weights, vit, what, hint)
    if positions is not None and positions.numel() != weights["pos_embed"].numel():
        notes.append(f"positions resized from {positions.numel() // positions.shape[-1]} to {weights['pos_embed'].shape[1]}")
    if source.pixels != (MEAN, STD):
        notes.append(_fold(weights, *source.pixels))
    return {f"image.vit.{name}": x for name, x in weights.items()}, notes


def _text(model: UniCLIP, tokenizer: CaptionTokenizer, source: Pretrained, what: str) -> tuple[Weights, list[str]]:
    if not source.text:
        raise InputError(f"[init] {what} has no text tower")
    notes = _same_traits("text", source, what, model.text)
    if source.tokenizer != tokenizer.to_json():
        raise InputError(f"[init] {what} has another vocabulary than this run: set "
                         "model.text.vocabulary as it was there (clip for open_clip's models)")
    weights, context = dict(source.text), len(model.text.position)
    positions = weights.get("position")
    if positions is not None and len(positions) > context:
        weights["position"] = positions[:context]
        notes.append(f"positions cut from {len(positions)} to {context}")
    _same_shapes("text", weights, model.text, what)
    if source.pooling != model.text.pooling:
        notes.append(f"trained with pooling {source.pooling!r} and its attention, model.text.pooling is {model.text.pooling!r}")
    return {f"text.{name}": x for name, x in weights.items()}, notes


def _same_traits(tower: str, source: Pretrained, what: str, ours: nn.Module) -> list[str]:
    """What is to be told. Raises InputError where the same weights would compute something else."""
    mine, theirs = traits_of(ours), source.traits.get(tower)
    if theirs is None:
        return [f"the file does not tell its activation ({mine[ACTIVATION][0]} here) and attention heads ({mine[HEADS][0]} "
                "here): give ARCHITECTURE@FILE to have them compared"]
    for trait in (ACTIVATION, HEADS):
        if theirs[trait] != mine[trait]:
            cure = "timm's vit_*_clip_quickgelu_* have QuickGELU" if (tower, trait) == ("image", ACTIVATION) else \
                "a text tower here has GELU" if trait == ACTIVATION else f"set model.{tower}.heads"
            raise InputError(f"[init] {what}: {trait} of its {tower} tower {_all(theirs[trait])}, of model.{tower} "
                             f"{_all(mine[trait])}: {cure}")
    return [f"{EPSILON} {_all(theirs[EPSILON])} there, {_all(mine[EPSILON])} here"] if theirs[EPSILON] != mine[EPSILON] else []


def _all(values: list) -> str:
    return " and ".join(map(str, values))


def _same_shapes(tower: str, weights: Weights, ours: nn.Module, what: str, hint: str = "") -> None:
    """Raises InputError naming the first tensor that differs, in the order of our tower."""
    wanted = ours.state_dict()
    for name, x in wanted.items():
        if name not in weights:
            raise InputError(f"[init] {what} has no {tower} {name}, which model.{tower} has{hint}")
        if weights[name].shape != x.shape:
            raise InputError(f"[init] {what}: {tower} {name} is {tuple(weights[name].shape)} there and {tuple(x.shape)} in "
                             f"model.{tower}: set its sizes as they are there{hint}")
    for name in weights:
        if name not in wanted:
            raise InputError(f"[init] {what}: its {tower} {name} has no place in model.{tower}{hint}")


def _take_head(model: UniCLIP, source: Pretrained, part: str, taken: Weights) -> bool:
    """Add a head's weights to `taken` when each of them fits."""
    wanted = {name: x for name, x in model.state_dict().items() if name.startswith(f"{part}.")}
    given = {name: x for name, x in source.heads.items() if name.startswith(f"{part}.")}
    if not wanted or {name: x.shape for name, x in wanted.items()} != {name: x.shape for name, x in given.items()}:
        return False
    taken |= given
    return True


def _fold(weights: Weights, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Patches are linear in the pixels: a kernel trained on pixels of another mean and std is made to fit ours → a note."""
    kernel_OCHW = weights["patch_embed.proj.weight"]
    m, s, mean_C, std_C = (kernel_OCHW.new_tensor(x) for x in (MEAN, STD, mean, std))
    weights["patch_embed.proj.weight"] = kernel_OCHW * (s / std_C)[:, None, None]
    shift_O = torch.einsum("ochw,c->o", kernel_OCHW, (m - mean_C) / std_C)
    if "patch_embed.proj.bias" in weights:
        weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + shift_O
        return "its patch kernel adapted to our pixels' mean and std"
    return "its patch kernel adapted to our pixels' std; it has no bias to take up their other mean"

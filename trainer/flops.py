"""Model FLOPs of a sample and what the device could do: MFU. Recomputed activations do not count as work."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.wording import CHOSEN
from trainer.auxiliary import Declip, Slip
from trainer.batches import text_lengths
from trainer.model import UniCLIP

# Dense bf16 peaks in FLOP/s, by a part of the name that torch gives the device (vendors' data sheets).
PEAKS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12}


def flops_by_length(model: UniCLIP, views: int, batch: int, texts: int = 1) -> dict[int, float]:
    """Forward and backward of one group in a global batch of `batch`: towers, heads, its share of the loss; by text length.

    texts: how many of a group pass through the text tower. A backward pass is two forward passes; the loss is one product of
    M × D by D × M with M = (V + 1)·batch.
    """
    device = next(model.parameters()).device
    size, context = model.image.size, model.text.position.shape[0]
    image = torch.zeros(1, 3, size, size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as image_counter:
        model.encode_image(image)
    members, dim = (views + 1) * batch, model.text_head.out_features
    loss = 2 * members * dim * (views + 1)
    flops = {}
    for length in text_lengths(context):
        with torch.no_grad(), FlopCounterMode(display=False) as text_counter:
            model.encode_text(torch.zeros(1, length, dtype=torch.long, device=device))
        towers = views * image_counter.get_total_flops() + texts * text_counter.get_total_flops()
        flops[length] = 3.0 * (towers + _auxiliary(model, views, length) + loss)
    return flops


def _auxiliary(model: UniCLIP, views: int, length: int) -> float:
    """Forward of one group through the heads of SLIP, for its strong views, or DeCLIP, for all and the masked words.

    DeCLIP's masked text is not embedded.
    """
    heads = model.auxiliary
    if isinstance(heads, Slip):
        return (views - 1) * _linear(heads.projection)
    if isinstance(heads, Declip):
        of_words = CHOSEN * length * _linear(heads.words) - _linear(model.text_head)
        return views * (_linear(heads.projection) + _linear(heads.prediction)) + of_words
    return 0.0


def _linear(module: nn.Module) -> int:
    """Of one row."""
    return sum(2 * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def flops_per_sample(model: UniCLIP, views: int, batch: int, texts: int = 1) -> float:
    """The same with a text as long as it can be."""
    return max(flops_by_length(model, views, batch, texts).values())


def peak_flops(device: str) -> float | None:
    """The device's dense bf16 peak, None where it is not known (CPUs, other GPUs)."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)

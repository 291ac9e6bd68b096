"""Both towers as ONNX graphs of any batch size, checked against torch before they count as written.

    image.onnx  pixels (B, 3, S, S) float32 → h (B, W), z (B, D), seen through the identity vector
    text.onnx   tokens (B, L) int64, L = the context → h (B, W), z (B, D)
"""

import importlib.util
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.console import InputError, WorkFailed
from pipeline.text import CaptionTokenizer
from trainer.model import UniCLIP

TOLERANCE = 1e-4  # of the largest value of the reference
ONE_FILE = 2**31 - 2**20  # bytes a protobuf may hold


class _ImageTower(nn.Module):
    def __init__(self, model: UniCLIP):
        super().__init__()
        self.model = model

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        h_BW = self.model.image(pixels_BCHW)
        return h_BW, self.model.project_image(h_BW)


class _TextTower(nn.Module):
    def __init__(self, model: UniCLIP):
        super().__init__()
        self.model = model

    def forward(self, token_BL: Tensor) -> tuple[Tensor, Tensor]:
        h_BW = self.model.text(token_BL)
        return h_BW, self.model.text_head(h_BW)


def write_onnx(model: UniCLIP, image_size: int, tokenizer: CaptionTokenizer, folder: Path) -> dict[str, float]:
    """image.onnx and text.onnx → the largest difference of each from torch, over batches of several sizes.

    Texts are checked at every length. Raises InputError without the packages, WorkFailed where a graph disagrees.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--onnx needs {', '.join(missing)}: pip install 'uniclip[onnx]'")
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would report to its makers, from the moment it is imported
    pixels_BCHW = torch.randn(5, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return {name: _write(folder / name, tower.eval(), input_name, example)
            for name, tower, input_name, example in (("image.onnx", _ImageTower(model), "pixels", pixels_BCHW),
                                                     ("text.onnx", _TextTower(model), "tokens", every_length(tokenizer)))}


def every_length(tokenizer: CaptionTokenizer) -> Tensor:
    """Token ids of captions of 0, 1, … context − 2 tokens → (context − 1, context)."""
    ids = torch.randint(tokenizer.vocab_size, (tokenizer.context - 1, tokenizer.context),
                        generator=torch.Generator().manual_seed(0))
    ids[(ids == tokenizer.start_id) | (ids == tokenizer.end_id)] = 0
    ids = ids.tril(1)
    ids.diagonal(1).fill_(tokenizer.end_id)
    ids[:, 0] = tokenizer.start_id
    return ids


def _write(path: Path, tower: nn.Module, input_name: str, example: Tensor) -> float:
    """Export, then run the file on the example and on its first item alone."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(tower, (example[:2],), dynamo=True, verbose=False, input_names=[input_name],
                                         output_names=["h", "z"], dynamic_shapes=({0: torch.export.Dim("batch")},))
    large = sum(p.numel() * p.element_size() for p in tower.parameters()) > ONE_FILE
    program.save(str(path), external_data=large)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (example, example[:1]):
        with torch.no_grad():
            references = tower(batch)
        for name, found, reference in zip(("h", "z"), session.run(None, {input_name: batch.numpy()}), references,
                                          strict=True):
            difference = ((torch.as_tensor(found) - reference).abs().max() / reference.abs().max()).item()
            if not difference <= TOLERANCE:
                raise WorkFailed(f"{path.name}: {name} of {len(batch)} differs from torch by {difference:.1e} of its largest "
                                 f"value (allowed: {TOLERANCE:.0e}); nothing was exported: leave out --onnx")
            worst = max(worst, difference)
    return worst

"""What only a GPU can show of the loss: its kernels are right, need little memory and keep the device busy."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from tools.bench_loss import TEXTS, VIEWS, WIDTH, inputs, largest_difference, measure, step
from tools.profiles import Ceilings, table, traced


def gradients(folder: Path, device: str, groups: int = 1024) -> dict:
    """Triton's kernels and PyTorch's tiles against the dense loss: largest difference of a gradient, relative."""
    found = {f"{name}_{dtype}": largest_difference(name, groups, device, dtype)
             for name in ("tiled", "torch") for dtype in ("float32", "bfloat16")}
    return found | {dtype: float(np.max([found[f"tiled_{dtype}"], found[f"torch_{dtype}"]]))  # NaN stays
                    for dtype in ("float32", "bfloat16")}


def beside_dense(folder: Path, device: str, groups: int = 4096, repeats: int = 5) -> dict:
    """Triton, PyTorch's tiles and dense in turn where dense fits: time and memory, and tiled / dense."""
    return measure(["dense", "tiled", "torch"], groups, device, "bfloat16", repeats)


def large(folder: Path, device: str, groups: int = 65_536, repeats: int = 5) -> dict:
    """A batch that dense cannot hold: memory with the embeddings, and the rate of useful work beside torch.mm's."""
    figures = measure(["tiled"], groups, device, "bfloat16", repeats)
    return figures | {"gib": (figures["bytes"]["tiled"] + groups * (VIEWS + TEXTS) * WIDTH * 2) / 2**30}


def profile(folder: Path, device: str, groups: int = 65_536, steps: int = 2) -> dict:
    """The loss alone, kernel by kernel. Of the two kernels' work half is counted: the rest is the transpose."""
    ceilings, tensors = Ceilings.measure(device), inputs(groups, device, "bfloat16")
    half = float(groups * (VIEWS + TEXTS)) ** 2 * WIDTH
    found = traced(lambda: step("tiled", tensors), device, steps, {"_log_sums": half, "_weights": half})
    return {"ceilings": asdict(ceilings), "idle": found.idle,
            "markdown": table(f"MP-NCE in tiles, {groups:,} groups, bf16", found, ceilings)}

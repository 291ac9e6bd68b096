"""MP-NCE in tiles against the dense loss with blockwise positives: time and memory of forward + backward, side by side.

`python -m tools.bench_loss` takes about five minutes on one core and writes table, plot and numbers to benchmarks/.
On a GPU: `python -m tools.bench_loss --device cuda --dtype bfloat16 --groups 4096,16384 --tiled-only 65536`.
"""

import json
import multiprocessing
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import matplotlib
import torch
import typer
from torch import Tensor

from tools.profiles import product, seconds
from trainer.losses import dense_loss
from trainer.tiles import tiled_loss

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)

VIEWS, TEXTS, WIDTH = 3, 1, 512
LOSSES: dict[str, Callable[..., Tensor]] = {"dense": dense_loss, "tiled": tiled_loss}
OTHERS: dict[str, Callable[..., Tensor]] = {"torch": partial(tiled_loss, backend="torch")}  # where Triton is the default
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def inputs(groups: int, device: str, dtype: str) -> list[Tensor]:
    """Random embeddings, τ = 0.07, b = 0; all want gradients."""
    torch.manual_seed(0)
    values = [torch.randn(groups, count, WIDTH).to(getattr(torch, dtype)) for count in (VIEWS, TEXTS)]
    return [x.to(device).requires_grad_() for x in (*values, torch.full((3,), 0.07), torch.zeros(3))]


def step(name: str, tensors: list[Tensor]) -> float:
    """Forward and backward → the loss."""
    for x in tensors:
        x.grad = None
    loss = (LOSSES | OTHERS)[name]("mp_nce", *tensors)
    loss.backward()
    return loss.item()


def status(key: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[key].split()[0]) * 1024


def peak_memory(name: str, groups: int, device: str, dtype: str) -> int:
    """Bytes above inputs at the highest point of a step; meant for a process of its own."""
    torch.set_num_threads(1)
    tensors = inputs(groups, device, dtype)
    step(name, inputs(2, device, dtype))  # what libraries allocate once
    if device == "cpu":
        before = status("VmRSS")
        step(name, tensors)
        return status("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(name, tensors)
    return torch.cuda.max_memory_allocated() - before


def in_own_process(work: Callable, *arguments):
    """work(*arguments) in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def interleaved(names: list[str], groups: int, device: str, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step of each, and of a product, turn by turn after a first one. The losses must agree."""
    tensors = inputs(groups, device, dtype)
    losses = [step(name, tensors) for name in names]
    if max(losses) - min(losses) > TOLERANCE[dtype] * abs(losses[0]):
        raise SystemExit(f"the losses differ: {dict(zip(names, losses, strict=True))}")
    works: dict[str, Callable] = {name: partial(step, name, tensors) for name in names}
    works["product"], _ = product(device, dtype)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def measure(names: list[str], groups: int, device: str, dtype: str, repeats: int) -> dict:
    """One row: seconds, bytes, ratios, and the rate of useful work, 4 half products of M²·D, relative to torch.mm's."""
    times = interleaved(names, groups, device, dtype, repeats)
    useful, (_, flops) = 4 * (groups * (VIEWS + TEXTS)) ** 2 * WIDTH, product(device, dtype)
    row = {"groups": groups, "seconds": {name: median(times[name]) for name in names},
           "bytes": {name: in_own_process(peak_memory, name, groups, device, dtype) for name in names},
           "rate_ratio": median(useful / t / (flops / p) for t, p in zip(times["tiled"], times["product"], strict=True))}
    if "dense" in names:
        row["time_ratio"] = median(t / d for t, d in zip(times["tiled"], times["dense"], strict=True))
        row["memory_ratio"] = row["bytes"]["tiled"] / row["bytes"]["dense"]
    return row


def largest_difference(name: str, groups: int, device: str, dtype: str) -> float:
    """Between the gradients of `name` and of the dense loss, relative to the largest: embeddings, τ, b."""
    tensors = inputs(groups, device, dtype)
    gradients = []
    for loss in ("dense", name):
        step(loss, tensors)
        gradients.append([x.grad.float() for x in tensors if x.grad is not None])
    each = [(x - y).abs().max() / y.abs().max() for y, x in zip(*gradients, strict=True)]
    return torch.stack(each).max().item()  # Python's max would pass over NaN


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| groups | dense s | tiled s | time ratio | dense MB | tiled MB | memory ratio | rate / torch.mm's |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        cells = [f"{row['groups']:,}", *(f"{row['seconds'][n]:.3f}" if n in row["seconds"] else "" for n in LOSSES),
                 f"{row['time_ratio']:.2f}" if "time_ratio" in row else "",
                 *(f"{row['bytes'][n] / 1e6:,.0f}" if n in row["bytes"] else "" for n in LOSSES),
                 f"{row['memory_ratio']:.3f}" if "memory_ratio" in row else "", f"{row['rate_ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory over the number of groups, both axes logarithmic."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, scale, unit in ((left, "seconds", 1, "seconds"), (right, "bytes", 1e6, "MB above inputs")):
        for name, mark in (("dense", "s"), ("tiled", "o")):
            points = [(row["groups"], row[key][name] / scale) for row in rows if name in row[key]]
            axis.loglog(*zip(*points, strict=True), marker=mark, label=name) if points else None
        axis.set_xticks([row["groups"] for row in rows], [f"{row['groups']:,}" for row in rows])
        axis.minorticks_off()
        axis.set(xlabel="groups of 3 views and 1 text, D = 512", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main(
    groups: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "512,1024,2048,4096",
    tiled_only: Annotated[str, typer.Option(help="Batch sizes that dense is not asked for.")] = "",
    repeats: Annotated[int, typer.Option(help="Steps of each, turn by turn.")] = 5,
    device: Annotated[str, typer.Option(help="cpu (one thread) or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision of the embeddings.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks"),
) -> None:
    """Measure, print the table, write loss-DEVICE.json, .md and .png."""
    torch.set_num_threads(1)
    rows = []
    for names, numbers in ((list(LOSSES), groups), (["tiled"], tiled_only)):
        for number in filter(None, numbers.split(",")):
            rows.append(measure(names, int(number), device, dtype, repeats))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    out.mkdir(exist_ok=True)
    said = {"device": device, "machine": machine, "torch": torch.__version__, "dtype": dtype, "threads": 1,
            "views": VIEWS, "texts": TEXTS, "width": WIDTH, "repeats": repeats, "rows": rows}
    (out / f"loss-{device}.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    about = (f"MP-NCE, forward + backward, {VIEWS} views and {TEXTS} text, D = {WIDTH}, {dtype}, {device}, one thread; "
             f"torch {torch.__version__}. Medians of {repeats} turns; ratios are medians of the turns' ratios; seconds "
             "on a CPU are the process's own; memory is the peak above inputs in a process of its own; the rate counts "
             "useful work, four half products of M²·D.\n\n")
    (out / f"loss-{device}.md").write_text(about + table(rows), encoding="utf-8")
    plot(rows, out / f"loss-{device}.png")
    print("\n" + table(rows))


if __name__ == "__main__":
    typer.run(main)

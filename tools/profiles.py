"""Where a step's time goes: a torch profiler trace as a table of kernels, each against what this device can do.

Ceilings are measured here, not taken from a data sheet. FLOPs of products, convolutions and attention follow from the shapes
in the trace; bytes are those of an operator's inputs, or of a copy: outputs come on top, and a gather reads less. Both count
for the operator's longest kernel. On a CPU operators stand in for kernels, with the time spent in themselves.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
from torch.profiler import ProfilerActivity, profile

SIZES = {"cpu": (512, 2**24), "cuda": (8192, 2**32)}  # side of a product's matrices, bytes of a copy
ROWS, LEAST_SHARE = 15, 0.005  # of a table
DEVICE_EVENTS = {"kernel", "gpu_memcpy", "gpu_memset"}
BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4, "bool": 1,
         "unsigned char": 1}
_ATTENTION = re.compile(r"aten::_scaled_dot_product_\w*attention\w*")
_NOISE = re.compile(r"^void |at::native::|\(anonymous namespace\)::|c10::")

Shapes = list[list[int]]
FLOPS: dict[str, Callable[[Shapes], float]] = {
    "aten::mm": lambda d: 2.0 * d[0][0] * math.prod(d[1]),
    "aten::addmm": lambda d: 2.0 * d[1][0] * math.prod(d[2]),
    "aten::bmm": lambda d: 2.0 * d[0][1] * math.prod(d[1]),
    "aten::baddbmm": lambda d: 2.0 * d[1][1] * math.prod(d[2]),
    # patch embeddings: the stride is the kernel, and images want no gradient
    "aten::convolution": lambda d: 2.0 * d[0][0] * (d[0][2] // d[1][2]) * (d[0][3] // d[1][3]) * math.prod(d[1]),
    "aten::convolution_backward": lambda d: 2.0 * d[0][0] * math.prod(d[0][2:]) * math.prod(d[2]),
}


def seconds(work: Callable[[], object], device: str) -> float:
    """Of one call: wall-clock on a GPU, the process's own on a CPU that it may have to share."""
    if device == "cpu":
        begin = process_time()
        work()
        return process_time() - begin
    torch.cuda.synchronize()
    begin = perf_counter()
    work()
    torch.cuda.synchronize()
    return perf_counter() - begin


def product(device: str, dtype: str) -> tuple[Callable[[], object], float]:
    """torch's own product of two large matrices, and its FLOPs."""
    size = SIZES[device][0]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


@dataclass(frozen=True)
class Ceilings:
    """What the device can do: FLOP/s of a product of large matrices, bytes read and written a second by a large copy."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: str, turns: int = 11) -> "Ceilings":
        """Both in turn, medians; products in bf16 on a GPU."""
        multiply, flops = product(device, "float32" if device == "cpu" else "bfloat16")
        source = torch.randint(255, (SIZES[device][1],), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times: list[list[float]] = [[], []]
        for _ in range(turns):
            for kept, work in zip(times, (multiply, lambda: target.copy_(source)), strict=True):
                kept.append(seconds(work, device))
        return cls(flops / median(times[0][1:]), 2 * len(source) / median(times[1][1:]))


@dataclass
class Row:
    """All launches of one kernel by one operator. flops and bytes: 0 where the trace does not tell."""

    operator: str
    kernel: str
    seconds: float = 0.0
    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Profile:
    """Rows of `steps` steps, longest first; seconds of as many steps that nobody watched."""

    steps: int
    seconds: float
    rows: list[Row]

    @property
    def idle(self) -> float:
        """Share of the time in which the device had nothing to do: launches, copies and reads that it waited for."""
        return max(0.0, 1 - sum(row.seconds for row in self.rows) / self.seconds)


@dataclass
class _Operator:
    name: str
    arguments: dict
    end: float
    parent: "_Operator | None"
    own: float

    @property
    def counted(self) -> "_Operator":
        """The operator whose shapes say what was computed: this one, or the nearest around it that has a formula."""
        found = self
        while not _formula(found.name) and found.parent:
            found = found.parent
        return found if _formula(found.name) else self

    @property
    def flops(self) -> float:
        formula = _formula(self.name)
        return formula(self.arguments["Input Dims"]) if formula and self.arguments.get("Input Dims") else 0.0

    @property
    def bytes(self) -> float:
        """Of the tensors given to it, each value that lies in memory once."""
        given = (self.arguments.get(name, []) for name in ("Input Dims", "Input Strides", "Input type"))
        return sum(math.prod(size for size, stride in zip(dims, strides, strict=True) if stride) * BYTES[kind]
                   for dims, strides, kind in zip(*given, strict=False) if kind in BYTES and dims)


def _formula(name: str) -> Callable[[Shapes], float] | None:
    return _attention(name) if _ATTENTION.fullmatch(name) else FLOPS.get(name)


def _attention(name: str) -> Callable[[Shapes], float]:
    """Two products forward, five backward; a backward pass takes the output's gradient first."""
    backward = name.endswith("_backward")

    def flops(dims: Shapes) -> float:
        (batch, heads, rows, width), (_, _, columns, _) = dims[backward:backward + 2]
        return 2.0 * (5 if backward else 2) * batch * heads * rows * columns * width
    return flops


def _operators(events: list[dict]) -> list[_Operator]:
    """The trace's operators, each below the one that called it."""
    found, stacks = [], {}
    for event in sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"])):
        stack = stacks.setdefault(event["tid"], [])
        while stack and stack[-1].end <= event["ts"]:
            stack.pop()
        parent = stack[-1] if stack else None
        operator = _Operator(event["name"], event.get("args", {}), event["ts"] + event["dur"], parent, event["dur"])
        if parent:
            parent.own -= event["dur"]
        stack.append(operator)
        found.append(operator)
    return found


def reduce(trace: dict, work: dict[str, float] | None = None) -> list[Row]:
    """A trace as torch.profiler exports it, with shapes → rows, longest first.

    work: FLOPs of all launches together of kernels that only their author can count, by a part of the kernel's name.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    operators = _operators(events)
    by_id = {operator.arguments.get("External id"): operator for operator in operators}
    on_device = [event for event in events if event.get("cat") in DEVICE_EVENTS]
    launches = [(event["name"], event["dur"], by_id.get(event["args"].get("External id")), event["args"].get("bytes", 0))
                for event in on_device] or [(op.name, max(op.own, 0.0), op, 0) for op in operators]
    rows: dict[tuple[str, str], Row] = {}
    longest: dict[int, tuple[float, _Operator, Row]] = {}
    for kernel, micros, operator, copied in launches:
        source = operator and operator.counted
        name = source.name if source else ""
        row = rows.setdefault((name, kernel), Row(name, kernel))
        row.seconds, row.calls, row.bytes = row.seconds + micros / 1e6, row.calls + 1, row.bytes + copied
        if source and not copied and micros > longest.get(id(source), (-1.0,))[0]:
            longest[id(source)] = (micros, source, row)
    for _, source, row in longest.values():
        row.flops += source.flops
        row.bytes += source.bytes
    for part, flops in (work or {}).items():
        for row in (row for row in rows.values() if part in row.kernel):
            row.flops = flops
    return sorted(rows.values(), key=lambda row: -row.seconds)


def traced(step: Callable[[], object], device: str, steps: int = 3, work: dict[str, float] | None = None) -> Profile:
    """Warm up, time `steps` steps unwatched, then watch as many. work: as `reduce` takes it, of one step."""
    def several() -> None:
        for _ in range(steps):
            step()
        if device != "cpu":
            torch.cuda.synchronize()

    several()
    begin = perf_counter()
    several()
    took = perf_counter() - begin
    activities = [ProfilerActivity.CPU, *([] if device == "cpu" else [ProfilerActivity.CUDA])]
    with profile(activities=activities, record_shapes=True) as watched:
        several()
    with tempfile.TemporaryDirectory() as folder:
        watched.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads((Path(folder) / "trace.json").read_text(encoding="utf-8"))
    return Profile(steps, took, reduce(trace, {part: steps * flops for part, flops in (work or {}).items()}))


def table(title: str, found: Profile, ceilings: Ceilings) -> str:
    """Markdown: the longest rows, with the share of each ceiling that they reach, and what is left."""
    lines = [f"## {title}", "",
             f"{1e3 * found.seconds / found.steps:.1f} ms a step, the device idle for {found.idle:.0%} of it. Ceilings, "
             f"measured in the same run: products {ceilings.flops / 1e12:,.1f} TFLOP/s, copies "
             f"{ceilings.bandwidth / 1e9:,.0f} GB/s.", "",
             "| operator | kernel | share | calls | ms | TFLOP/s | of product | GB/s in | of copy |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    whole = sum(row.seconds for row in found.rows) or math.inf
    shown = [row for row in found.rows[:ROWS] if row.seconds >= LEAST_SHARE * whole]
    for row in shown:
        lines.append(f"| {row.operator.removeprefix('aten::')} | {_NOISE.sub('', row.kernel)[:60].replace('|', ' ')} | "
                     f"{row.seconds / whole:.1%} | {row.calls / found.steps:g} | {1e3 * row.seconds / found.steps:.2f} | "
                     f"{_rates(row.flops / row.seconds, 1e12, ceilings.flops)} | "
                     f"{_rates(row.bytes / row.seconds, 1e9, ceilings.bandwidth)} |")
    rest = sum(row.seconds for row in found.rows) - sum(row.seconds for row in shown)
    lines.append(f"| others | {len(found.rows) - len(shown)} more | {rest / whole:.1%} | | {1e3 * rest / found.steps:.2f} "
                 "| | | | |")
    return "\n".join(lines) + "\n"


def _rates(rate: float, unit: float, ceiling: float) -> str:
    return f"{rate / unit:,.1f} | {rate / ceiling:.0%}" if rate else " | "

"""The constants of tools.scale: of one GPU, one machine, one network. Each is assumed, given, or measured, and says which."""

import dataclasses
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.console import InputError
from trainer.check import MODELLED_GIB
from trainer.flops import PEAKS

VIEWS, TEXTS, WIDTH = 3, 1, 512  # of tools.bench_loss
STEPS = {"vit-b32": "train.b32", "vit-b16": "train.b16"}  # preset → part of tools.gpu_check


def _constant(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Machine:
    """Achieved rates, not data-sheet ones, except for `peak`, which MFU refers to. By default an H200 in a machine of 8."""

    gpus: int = _constant(8, "GPUs", "in a machine, all joined by NVLink")
    peak: float = _constant(PEAKS["H200"], "FLOP/s", "data sheet, dense bf16")
    towers: float = _constant(0.45 * PEAKS["H200"], "FLOP/s", "DESIGN.md's target, 45 % of the peak")
    loss: float = _constant(0.5 * PEAKS["H200"], "FLOP/s", "DESIGN.md's target, 50 % of a matmul's")
    launch: float = _constant(8e-6, "s", "eager PyTorch, forward or backward of one operation")
    host: float = _constant(2e-3, "s", "of each step: loop, synchronisation, log")
    memory: float = _constant(MODELLED_GIB * 2**30, "bytes", "what torch reports of an H200")
    memory_share: float = _constant(0.85, "", "of the memory that a step may take by trainer/memory.py")
    memory_bandwidth: float = _constant(0.8 * 4.8e12, "bytes/s", "80 % of the data sheet's 4.8 TB/s")
    nvlink: float = _constant(0.8 * 450e9, "bytes/s", "80 % of 450 GB/s each way, 900 both ways, of a GPU")
    network: float = _constant(0.8 * 50e9, "bytes/s", "80 % of 400 Gb/s for each GPU")
    nvlink_hop: float = _constant(4e-6, "s", "NCCL's own cost table, protocol Simple")
    network_hop: float = _constant(14e-6, "s", "NCCL's own cost table, protocol Simple")
    overlap: float = _constant(0.8, "", "of the backward pass during which gradients travel unnoticed")
    decode: float = _constant(6000, "samples/s", "DESIGN.md's target for the views of one GPU")
    sample_bytes: float = _constant(30e3, "bytes", "a 256-px JPEG with its caption")
    storage: float = _constant(5e9, "bytes/s", "read by one machine, all machines at once")
    cores: float = _constant(0, "cores", "shared by all ranks; 0: each rank has a device of its own")

    def crowding(self, ranks: int) -> float:
        """How much longer a rank's work takes because ranks share cores."""
        return max(1.0, ranks / self.cores) if self.cores else 1.0


@dataclass(frozen=True)
class Known:
    """A machine, and where each constant comes from that is not assumed."""

    machine: Machine = Machine()
    origins: dict[str, str] = field(default_factory=dict)

    def with_(self, values: dict[str, float], origins: dict[str, str]) -> "Known":
        """Other values take the place of those known."""
        return Known(dataclasses.replace(self.machine, **values), self.origins | origins)

    def rows(self) -> list[dict[str, Any]]:
        """Every constant with value, unit, and what it rests on."""
        return [{"constant": one.name, "value": getattr(self.machine, one.name), "unit": one.metadata["unit"],
                 "is": self.origins.get(one.name, "assumed").partition(":")[0],
                 "from": self.origins.get(one.name, f":{one.metadata['source']}").partition(":")[2].strip()}
                for one in fields(Machine)]


def given(path: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Constants of a TOML file, and where they are from. Raises InputError for one that is none."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--machine {path}: {error}: give a TOML file of constants, `nvlink = 3e11`") from None
    names = {one.name for one in fields(Machine)}
    for name, value in values.items():
        if name not in names:
            raise InputError(f"--machine {path}: {name} is no constant: give some of {', '.join(sorted(names))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0 or value == 0 and name != "cores":
            raise InputError(f"--machine {path}: {name} = {value!r}: give a number above 0")
    return values, dict.fromkeys(values, f"given: {path}")


def measured(path: Path, preset: str) -> tuple[dict[str, float], dict[str, str]]:
    """Constants that the figures of tools.gpu_check tell, and where each is from. Raises InputError for another file.

    Towers: FLOP/s of the preset's own step, the better of eager and compiled; of other presets' the lowest, for want of it.
    """
    try:
        parts = {name: part for name, part in json.loads(path.read_text())["parts"].items() if part["status"] == "measured"}
        found = dict(_constants({name: part["figures"] for name, part in parts.items()}, preset))
        origins = {name: f"measured: {path.name} {part}, {parts[part]['machine']}, commit {parts[part]['commit']}"
                   for name, (_, part) in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--measured {path}: {type(error).__name__}: {error}: give the file that `python -m tools.gpu_check` "
                         "writes") from None
    if rehearsed := next((name for name, part in parts.items() if part["machine"].startswith("CPU")), None):
        raise InputError(f"--measured {path}: {rehearsed} was rehearsed on a CPU: give figures that `python -m "
                         "tools.gpu_check` measured on a GPU")
    return {name: value for name, (value, _) in found.items()}, origins


def _constants(found: dict[str, dict], preset: str) -> Iterator[tuple[str, tuple[float, str]]]:
    """From figures by part: constant, value, part."""
    steps = {name: (max(way["tflops"] for way in found[part]["ways"].values()) * 1e12, part)
             for name, part in STEPS.items() if part in found}
    if steps:
        yield "towers", steps.get(preset, min(steps.values()))
    if large := found.get("loss.large"):
        yield "loss", (4 * (large["groups"] * (VIEWS + TEXTS)) ** 2 * WIDTH / large["seconds"]["tiled"], "loss.large")
    if speed := found.get("stream.speed"):
        yield "decode", (speed["samples_per_second"], "stream.speed")
    if profiled := next((name for name in sorted(found) if name.startswith("profile.")), None):
        yield "memory_bandwidth", (found[profiled]["ceilings"]["bandwidth"], profiled)

"""What `tools.gpu_check` measures, and what is asked of it: the one table of DESIGN §6's targets for an H200.

`python -m tools.gpu_parts NAME FOLDER DEVICE` runs one part in this process and writes FOLDER/NAME.json. On a CPU sizes are
a miniature's: the same code, and figures of speed that mean nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.files import write_json

MEASURED, LACKING = "measured", "needs"


@dataclass(frozen=True)
class Target:
    """A figure of a part, and what it must be at least or at most, if anything. exact: in a miniature too."""

    figure: str
    against: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    exact: bool = False

    def __str__(self) -> str:
        if self.least is None and self.most is None:
            return ""
        sign, bound = ("≤", self.most) if self.least is None else ("≥", self.least)
        return "yes" if bound is True else f"{sign} {number(bound)} {self.unit}".rstrip()

    def verdict(self, value: float, miniature: bool = False) -> str:
        """NaN meets nothing."""
        if not str(self) or (miniature and not self.exact):
            return MEASURED
        met = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        return "met" if met else "missed"


def number(value: Any) -> str:
    """For people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Part:
    """work() loads a function of (folder, device, sizes) → figures; `small` changes sizes for a CPU, needs are packages."""

    about: str
    work: Callable[[], Callable[..., dict]]
    targets: tuple[Target, ...] = ()
    needs: tuple[str, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)


def _stream() -> Any:
    from tools import gpu_stream
    return gpu_stream


def _loss() -> Any:
    from tools import gpu_loss
    return gpu_loss


def _train() -> Any:
    from tools import gpu_train
    return gpu_train


MODEL = {"model.image.size": 32, "model.image.patch": 16, "model.image.width": 32, "model.image.depth": 1,
         "model.image.heads": 2, "model.text.context": 16, "model.text.width": 32, "model.text.depth": 1,
         "model.text.heads": 2, "model.dim": 16, "data.threads": 1}
TOWERS = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
          "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
RUN = {"files": 24, "batch": 8, "steps": 4, "more": MODEL}
SIDE = {"files": 24, "batch": 8, "steps": 3, "turns": 1, "workers": 2, "sizes": TOWERS}
GROUPS = {"vit-b32": 1024, "vit-b16": 384}  # of three views each
PAIRS = {"ViT-B-32": 1024, "ViT-B-16": 512}
OURS, MEMORY = "our share of the product measured in the same run", "of the device"


def _step(preset: str) -> Part:
    return Part(f"{preset}, bf16, three views, the whole loop on resident batches", lambda: _train().step,
                (Target("mfu", "the data sheet's bf16 peak", least=0.45), Target("of_product", OURS),
                 Target("memory_gib", MEMORY, "GiB")),
                sizes={"preset": preset, "batch": GROUPS[preset]}, small=RUN | {"turns": 1})


def _waiting(preset: str) -> Part:
    return Part(f"{preset}, bf16, compiled, three views from DALI", lambda: _train().waiting,
                (Target("data_wait", "the loop's time", most=0.02), Target("samples_per_second", "samples of three views")),
                ("nvidia.dali",), {"preset": preset, "batch": GROUPS[preset]}, RUN | {"compiled": False})


def _beside(model: str, **sizes: bool) -> Part:
    """Compiling takes a minute each: one turn then."""
    tars = not sizes.get("resident", True)
    about = ", ".join([model, "bf16", "one view", "compiled" if sizes.get("compiled") else "eager",
                       "each with its own loader from the same tars" if tars else "resident batches"])
    targets = Target("ratio", "images/s of open_clip's trainer", "×", least=1.15), Target("images_per_second", "ours")
    return Part(about, lambda: _train().open_clip, targets, ("open_clip_train", "open_clip", *["nvidia.dali"] * tars),
                sizes | {"model": model, "batch": PAIRS[model], "turns": 1 if sizes.get("compiled") else 2}, SIDE)


def _profile(preset: str) -> Part:
    return Part(f"a step of {preset}, bf16, three views: kernels against the ceilings", lambda: _train().profile,
                sizes={"preset": preset, "batch": GROUPS[preset]},
                small={"files": 24, "batch": 8, "more": MODEL, "compiled": [False]})


PARTS: dict[str, Part] = {
    "stream.pixels": Part(
        "DALI on the device", lambda: _stream().pixels,
        (Target("vectors_equal", "vectors on the CPU", least=True, exact=True),
         Target("mean", "Pillow's pixels", "/ 255", most=0.3, exact=True),
         Target("quantile_999", "Pillow's pixels", "/ 255", most=4, exact=True)),
        ("nvidia.dali",)),
    "stream.speed": Part(
        "three 224-px views of 256-px JPEGs", lambda: _stream().speed,
        (Target("samples_per_second", "samples of three views", least=6000), Target("ratio", "torchvision on all cores", "×"),
         Target("device_gib", MEMORY, "GiB")),
        ("nvidia.dali", "torchvision"), small={"count": 24, "samples": 16, "batch": 8, "each": 2, "turns": 1}),
    "loss.gradients": Part(
        "Triton's kernels and PyTorch's tiles, largest difference of a gradient", lambda: _loss().gradients,
        (Target("float32", "dense reference", most=1e-3, exact=True),
         Target("bfloat16", "dense reference", most=5e-2, exact=True)), small={"groups": 32}),
    "loss.dense": Part(
        "MP-NCE, 4,096 groups: Triton, PyTorch's tiles and dense in turn", lambda: _loss().beside_dense,
        (Target("time_ratio", "dense", "×"), Target("memory_ratio", "dense", "×")), small={"groups": 64, "repeats": 1}),
    "loss.large": Part(
        "MP-NCE, 65,536 groups, D = 512, bf16", lambda: _loss().large,
        (Target("gib", "dense: 256 GiB a matrix", "GiB", most=4),
         Target("rate_ratio", "bf16 matmul rate of the same run", "×", least=0.5)), small={"groups": 64, "repeats": 1}),
    "train.agreement": Part(
        "losses of four steps, six blocks of vit-b32's towers, relative difference", lambda: _train().agreement,
        (Target("cpu", "fp32, eager, on the device", most=1e-3, exact=True),
         Target("compiled", "fp32, eager, on the device", most=1e-3, exact=True),
         Target("bf16", "fp32, eager, on the device", most=2e-2, exact=True),
         Target("bf16_compiled", "fp32, eager, on the device", most=2e-2, exact=True)),
        sizes={"more": {"model.image.depth": 6, "model.text.depth": 6}}, small=RUN),
    "train.resume": Part(
        "a run stopped halfway and resumed, to the bit", lambda: _train().resumed,
        (Target("traces_equal", "a run never stopped", least=True, exact=True),
         Target("weights_equal", "a run never stopped", least=True, exact=True)), small=RUN),
    "train.b32": _step("vit-b32"),
    "train.b16": _step("vit-b16"),
    "train.waiting-b32": _waiting("vit-b32"),
    "train.waiting-b16": _waiting("vit-b16"),
    "train.open_clip-b32": _beside("ViT-B-32"),
    "train.open_clip-b32-compiled": _beside("ViT-B-32", compiled=True),
    "train.open_clip-b16": _beside("ViT-B-16"),
    "train.open_clip-b16-compiled": _beside("ViT-B-16", compiled=True),
    "train.open_clip-tars": _beside("ViT-B-32", resident=False),
    "profile.b32": _profile("vit-b32"),
    "profile.b16": _profile("vit-b16"),
    "profile.loss": Part("MP-NCE, 65,536 groups: kernels against the ceilings", lambda: _loss().profile, small={"groups": 64}),
    "profile.stream": Part("the loader alone: kernels against the ceilings", lambda: _stream().profile, (), ("nvidia.dali",),
                           small={"count": 24, "batch": 8, "steps": 3}),
}


def run(name: str, folder: Path, device: str) -> dict:
    """A part's status, and its figures where nothing is missing."""
    part = PARTS[name]
    try:
        for package in part.needs:
            import_module(package)
        return {"status": MEASURED, "figures": part.work()(
            folder=folder, device=device, **part.sizes | (part.small if device == "cpu" else {}))}
    except ModuleNotFoundError as error:
        return {"status": f"{LACKING} {error.name}"}


if __name__ == "__main__":
    chosen, place, where = sys.argv[1:]
    write_json(Path(place) / f"{chosen}.json", run(chosen, Path(place), where))

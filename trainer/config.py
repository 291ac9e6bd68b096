"""What a run is: frozen models of its one TOML file, which refuse unknown keys."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.sampling import KINDS, MAX_JITTER, MEDIUM, RECIPES, STRONG, VIEW_RANGES, WEAK, ViewKind

VIEWS = {"clip": "one view", "slip": "a view for CLIP and two strong or medium ones", "declip": "two views"}


class Section(BaseModel):
    """Frozen; unknown keys are errors, and so are numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Range = tuple[float, float]
Share = Annotated[float, Field(ge=0, lt=1)]
Part = Literal["image", "text", "augmentation", "image_head", "text_head", "similarity", "auxiliary"]
Here = Annotated[Path, AfterValidator(Path.absolute)]  # a run may be resumed from another folder


class ViewConfig(Section):
    """How one kind of view is drawn; see pipeline.sampling.ViewKind."""

    area: Range
    aspect: Range = WEAK.aspect
    jitter: tuple[float, float, float, float] = WEAK.jitter
    jitter_p: float = Field(default=0.0, ge=0, le=1)
    gray_p: float = Field(default=0.0, ge=0, le=1)
    blur_sigma: Range = WEAK.blur_sigma
    blur_p: float = Field(default=0.0, ge=0, le=1)
    flip_p: float = Field(default=0.0, ge=0, le=1)

    @field_validator("area", "aspect", "blur_sigma")
    @classmethod
    def _range(cls, given: Range, info: ValidationInfo) -> Range:
        least, most, of = VIEW_RANGES[str(info.field_name)]
        if not least <= given[0] <= given[1] <= most:
            raise ValueError(f"is no range of {of}: give [low, high] with {least:g} ≤ low ≤ high ≤ {most:g}")
        return given

    @field_validator("jitter")
    @classmethod
    def _half_widths(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= width <= most for width, most in zip(given, MAX_JITTER, strict=True)):
            raise ValueError("give brightness, contrast and saturation in 0 … 1 and hue in 0 … 0.5")
        return given


def _view_config(kind: ViewKind) -> ViewConfig:
    return ViewConfig(**vars(kind))


class DataConfig(Section):
    """Where samples come from, which of them and how often, and what is drawn from each.

    index (exact) or stream (tars without an index, `shards/{000..009}.tar`). shards: folder or URL of the index's tars
    when they are not beside it, with copies in `cache`. weights: source → times an epoch. skip: Parquet files with a
    column sample_id. recipe: a name in RECIPES, or kinds of views. read_timeout: seconds after which a read that has not
    answered costs its sample, or the rest of its tar in a stream.
    """

    index: Here | None = None
    stream: str | None = None
    shards: str = ""
    cache: Here | None = None
    cache_gb: float = Field(default=20, gt=0)
    read_timeout: float = Field(default=60, gt=0)
    weights: dict[str, float] = {}
    skip: tuple[Here, ...] = ()
    recipe: str | tuple[str, ...] = "uniclip"
    weak: ViewConfig = _view_config(WEAK)
    medium: ViewConfig = _view_config(MEDIUM)
    strong: ViewConfig = _view_config(STRONG)
    executor: Literal["auto", "dali", "pillow"] = "auto"
    threads: int = Field(default=0, ge=0)
    bad_sample_budget: float = Field(default=0.01, ge=0, le=1)

    @field_validator("weak", "medium", "strong", mode="before")
    @classmethod
    def _completed(cls, given: Any, info: ValidationInfo) -> Any:
        """What is not said of a kind of view is as by default."""
        return {**vars(KINDS[str(info.field_name)]), **given} if isinstance(given, dict) else given

    @field_validator("recipe")
    @classmethod
    def _known(cls, recipe: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if recipe in RECIPES or (isinstance(recipe, tuple) and recipe and set(recipe) <= set(KINDS)):
            return recipe
        raise ValueError(f"give one of {', '.join(RECIPES)}, or a list of views from {', '.join(KINDS)}")

    @model_validator(mode="after")
    def _one_way_in(self) -> "DataConfig":
        if (self.index is None) == (self.stream is None):
            raise ValueError("set either data.index or data.stream")
        if self.stream is not None and (self.shards or self.cache or self.weights):
            raise ValueError("data.shards, data.cache and data.weights need an index: data.stream reads whole tars in turn")
        return self

    def kinds(self) -> tuple[ViewKind, ...]:
        """The kinds of the views, in order."""
        return tuple(ViewKind(**vars(getattr(self, name))) for name in self.view_names())

    def view_names(self) -> tuple[str, ...]:
        """The names of these kinds."""
        return RECIPES[self.recipe] if isinstance(self.recipe, str) else self.recipe


class ImageConfig(Section):
    """f_I: a timm ViT; patch, width, depth and heads override the architecture's own."""

    arch: str
    size: int = Field(default=224, gt=0)
    patch: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)
    depth: int | None = Field(None, gt=0)
    heads: int | None = Field(None, gt=0)


class TextConfig(Section):
    """f_T and its vocabulary: CLIP's, or a byte-level BPE of `vocab_size` trained on the run's captions."""

    vocabulary: Literal["clip", "train"] = "clip"
    vocab_size: int = Field(default=4096, ge=300)
    context: int = Field(default=77, ge=3)
    width: int = Field(default=512, gt=0)
    depth: int = Field(default=12, gt=0)
    heads: int = Field(default=8, gt=0)
    pooling: Literal["start", "end"] = "start"

    @model_validator(mode="after")
    def _divides(self) -> "TextConfig":
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} do not divide width = {self.width}")
        return self


class HeadConfig(Section):
    """g_I, and whether it sees f_A's embedding of the augmentation vector."""

    kind: Literal["residual", "mlp"] = "residual"
    depth: int = Field(default=3, ge=1)
    augmentation: bool = True
    augmentation_width: int = Field(default=256, gt=0)


class SimilarityConfig(Section):
    """Eq. 16 ("domain") or Eq. 14 ("shared"), and where its parameters start."""

    kind: Literal["domain", "shared"] = "domain"
    temperature: float = Field(default=0.07, ge=0.01)


class ModelConfig(Section):
    """The UniCLIP model."""

    dim: int = Field(default=512, gt=0)
    image: ImageConfig
    text: TextConfig = TextConfig()
    head: HeadConfig = HeadConfig()
    similarity: SimilarityConfig = SimilarityConfig()


class InitConfig(Section):
    """Weights a fresh run starts from; see trainer.initialise. freeze: towers whose weights stay as they are.

    image: "timm:NAME", "open_clip:WHAT", or a run, checkpoint or export folder; text: the last two. WHAT: a weights file,
    ARCHITECTURE@FILE, a folder with open_clip_config.json, or hf-hub:ORG/NAME.
    """

    image: str = ""
    text: str = ""
    freeze: tuple[Literal["image", "text"], ...] = ()

    @model_validator(mode="after")
    def _frozen_weights_are_given(self) -> "InitConfig":
        for tower in self.freeze:
            if not getattr(self, tower):
                raise ValueError(f"freeze = \"{tower}\" would keep random weights: set init.{tower} too")
        return self


class ObjectiveConfig(Section):
    """UniCLIP, or a baseline of trainer.objectives, which sets what `config_file.BASELINE` says wherever the file does not.

    hidden: width of the hidden layers that SLIP and DeCLIP add, 0 for their own (4096 and 1024). queue: texts among which
    DeCLIP looks for nearest neighbours; fewer than an epoch has, or the nearest one is the text itself. synonyms: a file of
    lines `word<TAB>synonym, synonym`, with which DeCLIP alters captions too.
    """

    name: Literal["uniclip", "clip", "slip", "declip"] = "uniclip"
    hidden: int = Field(default=0, ge=0)
    queue: int = Field(default=65_536, gt=0)
    synonyms: Here | None = None

    @property
    def texts(self) -> int:
        """How many texts of a sample pass through the tower."""
        return 3 if self.name == "declip" else 1


class LossConfig(Section):
    """UniCLIP's loss: a member of trainer.losses.LOSSES."""

    name: Literal["mp_nce", "mp_nce_unweighted", "multi_positive_infonce", "mil_nce", "supcon"] = "mp_nce"
    supervision: Literal["unified", "separate"] = "unified"

    @model_validator(mode="after")
    def _separable(self) -> "LossConfig":
        if self.supervision == "separate" and self.name in {"mil_nce", "supcon"}:
            raise ValueError(f"supervision \"separate\" is undefined for {self.name}: use \"unified\"")
        return self


class OptimConfig(Section):
    """AdamW with warm-up and a cosine to zero; all lengths in samples, so another GPU count changes nothing.

    batch_size is the global one. accumulation: parts in which each process takes its slice of it, for less memory; the loss
    and its gradient stay the whole batch's. lr_scale: part of the model → factor on lr. layer_decay: factor on lr for each
    block further from the output, in both towers. average_samples: time constant of a moving average of the weights, which
    evaluation then uses; 0 for none. skips: updates with a loss or gradient that is not finite, left out, until the run ends.
    """

    samples: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    accumulation: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup_samples: int = Field(default=0, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: float = Field(default=0.2, ge=0)
    clip: float = Field(default=1.0, gt=0)
    lr_scale: dict[Part, Annotated[float, Field(ge=0)]] = {}
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    average_samples: int = Field(default=0, ge=0)
    skips: int = Field(default=10, ge=0)


class RunConfig(Section):
    """Where the run lives, what it runs on, how often it writes.

    sharding: "fsdp" splits weights, gradients and optimizer over the processes (FSDP2). recompute: activations of the blocks
    are computed again in the backward pass, for less memory. mirror: an fsspec URL that gets a copy of every checkpoint.
    wandb: name of a project there.
    """

    folder: Here
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["fp32", "bf16"] = "fp32"
    sharding: Literal["none", "fsdp"] = "none"
    recompute: bool = False
    compile: bool = False
    log_every: int = Field(default=10, gt=0)
    save_every_samples: int = Field(gt=0)
    save_every_minutes: float = Field(default=30, gt=0)
    keep: int = Field(default=2, gt=0)
    mirror: str = ""
    wandb: str = ""

    @field_validator("folder", mode="before")
    @classmethod
    def _local(cls, folder: Any) -> Any:
        if "://" in str(folder):
            raise ValueError("a run lives in a local folder: set run.mirror to this URL for a copy of its checkpoints there")
        return folder


class EvalConfig(Section):
    """Evaluation during training, every so many samples and at the end; 0 for never.

    held_out: an index whose loss is measured, under the run's own recipe. sets: folders as `uniclip-eval` takes them, of
    which `split` is used; samples: at most so many of each, evenly spaced, 0 for all. batch_size: images embedded at once;
    texts are four times as many.
    """

    every_samples: int = Field(default=0, ge=0)
    held_out: Here | None = None
    sets: tuple[Here, ...] = ()
    split: str = "test"
    samples: int = Field(default=0, ge=0)
    batch_size: int = Field(default=64, gt=0)

    @model_validator(mode="after")
    def _something(self) -> "EvalConfig":
        if self.every_samples and not (self.held_out or self.sets):
            raise ValueError("every_samples asks for an evaluation of nothing: set eval.held_out or eval.sets too")
        return self


class Config(Section):
    """One run."""

    data: DataConfig
    model: ModelConfig
    init: InitConfig = InitConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    eval: EvalConfig = EvalConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _fits_the_objective(self) -> "Config":
        """What a baseline does not use is refused; [loss] as far as it is not at its default."""
        name, names, views = self.objective.name, self.data.view_names(), VIEWS.get(self.objective.name, "")
        if name == "uniclip":
            return self
        if self.loss != LossConfig():
            raise ValueError(f"[loss] is UniCLIP's, objective.name = \"{name}\" has its own: leave [loss] out")
        if self.model.similarity.kind != "shared":
            raise ValueError(f"objective.name = \"{name}\" has one temperature: set model.similarity.kind=shared")
        if len(names) != len(RECIPES[name]) or name == "slip" and "weak" in names[1:]:
            raise ValueError(f"objective.name = \"{name}\" needs {views}, data.recipe gives {', '.join(names)}: set "
                             f"data.recipe={name}")
        if name in ("slip", "declip") and self.run.sharding == "fsdp":
            raise ValueError(f"objective.name = \"{name}\" has heads that cannot be sharded: set run.sharding=none")
        return self

    @property
    def learns_offset(self) -> bool:
        """b has no effect under shared similarity or separate supervision (Eq. 15); it stays frozen at 0 there."""
        return self.model.similarity.kind == "domain" and self.loss.supervision == "unified"

    def to_toml(self) -> str:
        """The resolved file, as stored in the run folder."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

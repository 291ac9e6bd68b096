"""What a run consists of, and how it is put together: fresh, or as a checkpoint left it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pipeline.console import InputError
from pipeline.loader import Indexed
from pipeline.plan import read_skip_lists
from pipeline.reader import Place
from pipeline.recipe import Cursor, Recipe
from pipeline.stream import Stream
from pipeline.text import CaptionTokenizer
from pipeline.wording import Wording
from trainer import checkpoint
from trainer.config import Config, DataConfig, TextConfig
from trainer.distributed import ALONE, Ranks, pick_device
from trainer.initialise import freeze, initialise
from trainer.mirror import Mirror
from trainer.model import UniCLIP
from trainer.optim import Average, make_optimizer
from trainer.parallel import Step, parallel, whole
from trainer.pretrained import taken_tokenizer
from trainer.weights_file import fitting


@dataclass
class Training:
    """Everything a run consists of besides its configuration.

    `step_of` is the model as the loop calls it, `notes` what is to be said of the weights it starts from.
    """

    model: UniCLIP
    step_of: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None
    tokenizer: CaptionTokenizer
    data: Indexed | Stream
    recipe: Recipe
    cursor: Cursor
    ranks: Ranks
    device: str
    notes: list[str]
    step: int = 0
    skipped: int = 0
    seconds: float = 0.0


def open_data(config: DataConfig) -> Indexed | Stream:
    """What [data] names. Raises InputError."""
    skip_ids = read_skip_lists(config.skip)
    if config.index is None:
        return Stream.open(config.stream or "", skip_ids, config.read_timeout)
    place = Place(config.shards, config.cache, int(config.cache_gb * 2**30), config.read_timeout)
    return Indexed.open(config.index, config.weights, skip_ids, place)


def make_tokenizer(config: TextConfig, data: Indexed | Stream, init: str = "") -> CaptionTokenizer:
    """CLIP's vocabulary; the one of the text tower that `init` names; or one trained on the captions of the data."""
    if config.vocabulary == "clip":
        return CaptionTokenizer.clip(config.context)
    return taken_tokenizer(init, config.context) or CaptionTokenizer.train(data.captions(), config.vocab_size, config.context)


def start(config: Config, device: str | None = None, ranks: Ranks = ALONE) -> Training:
    """A run at its beginning. Raises InputError when its folder or its mirror already holds one."""
    folder = config.run.folder
    if (folder / "checkpoints" / checkpoint.LATEST).is_file():
        raise InputError(f"{folder} already holds a run: go on with `uniclip-train resume {folder}`, or choose another "
                         "with --set run.folder=…")
    if config.run.mirror:
        Mirror(config.run.mirror).refuse_another()
    data = open_data(config.data)
    return _assemble(config, data, make_tokenizer(config.model.text, data, config.init.text), device, ranks)


def restored(folder: Path, device: str | None = None, ranks: Ranks = ALONE, overrides: Sequence[str] = ()
             ) -> tuple[Config, Training]:
    """A run at its latest complete checkpoint. Raises InputError when the data is not what it was."""
    source = checkpoint.find(folder)
    state = checkpoint.read_state(source)
    loaded = checkpoint.load_model(source, average=False)
    config = checkpoint.load_config_of(source, overrides)
    if config.run.mirror not in ("", checkpoint.load_config_of(source).run.mirror):
        Mirror(config.run.mirror).refuse_another()
    t = _assemble(config, open_data(config.data), loaded.tokenizer, device, ranks, source)
    t.cursor.refuse_other(state.cursor)
    t.cursor, t.step, t.seconds, t.skipped = state.cursor, state.step, state.seconds, state.skipped
    return config, t


def _assemble(config: Config, data: Indexed | Stream, tokenizer: CaptionTokenizer, device: str | None, ranks: Ranks,
              source: Path | None = None) -> Training:
    """`source`: the checkpoint whose weights, optimizer and random state go in."""
    device = device or pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    model = checkpoint.make_model(config, tokenizer)
    saved = checkpoint.read_tensors(source) if source else None
    notes = [] if saved else initialise(model, tokenizer, config.init)
    freeze(model, config.init)
    if saved:
        model.load_state_dict(saved.weights)
    model.to(device).recompute(config.run.recompute)
    step = parallel(Step(model, config.run.precision == "bf16"), ranks, device, config.run.sharding)
    if config.run.compile:
        model.image.compile()
        model.text.compile()
    with fitting(source / checkpoint.AVERAGE, "the model") if source else nullcontext():
        average = Average(model, samples, saved and saved.average) if (samples := config.optim.average_samples) else None
    optimizer = make_optimizer(model, config.optim)
    if saved:
        with fitting(source / checkpoint.OPTIMIZER, "this run"):  # type: ignore[operator]
            _put_back(saved, model, optimizer)
    wording = Wording.read(config.objective.synonyms) if config.objective.name == "declip" else None
    recipe = Recipe(config.data.kinds(), config.model.image.size, config.data.executor, config.data.threads, wording)
    cursor = Cursor(config.run.seed, 0, data.fingerprint, recipe.fingerprint(**data.chosen))
    ranks.wait()  # none looks at the folder from here on
    return Training(model, step, optimizer, average, tokenizer, data, recipe, cursor, ranks, device, notes)


def _put_back(saved: checkpoint.Tensors, model: UniCLIP, optimizer: torch.optim.Optimizer) -> None:
    """Optimizer, random state and memory as they were. Raises ValueError where they are not of this model and [optim]."""
    if saved.optimizer:
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        if {name for group in saved.optimizer["param_groups"] for name in group["params"]} != names:
            raise ValueError("it names other parameters than the model has")
        rules = [_rules(group) for group in optimizer.param_groups]
        groups = [group | _machine_s(optimizer) for group in saved.optimizer["param_groups"]]
        set_optimizer_state_dict(model, optimizer, saved.optimizer | {"param_groups": groups},
                                 options=StateDictOptions(full_state_dict=True))
        if [_rules(group) for group in optimizer.param_groups] != rules:
            raise ValueError("its groups of parameters are other than [optim] says")
        for parameter, state in optimizer.state.items():
            if any(state[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")) or state["step"].numel() != 1:
                raise ValueError("its moments have other shapes than the weights")
    torch.set_rng_state(saved.rng)
    for name, x in saved.memory.items():
        model.get_buffer(name).copy_(x)


def _rules(group: dict[str, Any]) -> dict[str, Any]:
    """What [optim] decides of a group, besides the rate, which each step sets anew."""
    return {name: list(value) if isinstance(value := group.get(name), tuple) else value
            for name in ("weight_decay", "lr_scale", "betas", "eps")}


def _machine_s(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """How this device computes the step: a checkpoint of another one must not change it."""
    return {name: optimizer.defaults[name] for name in ("fused", "foreach", "capturable")}


def snapshot(config: Config, t: Training, seconds: float, with_optimizer: bool = True) -> checkpoint.Snapshot:
    """A copy of all that a checkpoint holds, on the CPU: the run may go on. All ranks must call it when sharded.

    Rank 0 alone writes it, so the others hold nothing. (torch's `full_state_dict` with `cpu_offload` does the same on a GPU;
    on a CPU it hands out the very tensors that training goes on to change.)
    """
    def copied(state: Any) -> Any:
        if isinstance(state, Tensor):
            x = whole(state).detach()
            return x.to("cpu", copy=True).contiguous() if t.ranks.rank == 0 else torch.empty(0)
        if isinstance(state, dict):
            return {name: copied(value) for name, value in state.items()}
        return [copied(value) for value in state] if isinstance(state, list) else state

    weights = copied(t.model.state_dict())
    optimizer = copied(get_optimizer_state_dict(t.model, t.optimizer)) if with_optimizer and t.optimizer.state else {}
    memory = copied({name: x for name, x in t.model.named_buffers() if name.startswith("auxiliary.")})
    average = copied(t.average.weights) if t.average else None
    tensors = checkpoint.Tensors(weights, optimizer, average, torch.get_rng_state(), memory)
    return checkpoint.Snapshot(tensors, t.tokenizer.to_json(), config.to_toml(), t.step, t.cursor,
                               t.seconds + seconds, t.skipped)

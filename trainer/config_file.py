"""A run's TOML file, read once: presets, overrides by `--set`, and errors that name the place and the cure."""

import difflib
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.console import InputError
from trainer.config import VIEWS, Config, EvalConfig

PRESETS = Path(__file__).parent / "configs"
BASELINE = {"model.text.pooling": "end", "model.head.kind": "mlp", "model.head.depth": 1, "model.head.augmentation": False,
            "model.similarity.kind": "shared"}  # CLIP's: a causal text tower, a linear head (one layer), one temperature
MAY_CHANGE = {  # when a run goes on: of what it computes nothing but last bits
    "data": ("index", "shards", "cache", "cache_gb", "read_timeout", "skip", "executor", "threads", "bad_sample_budget"),
    "objective": ("synonyms",), "optim": ("accumulation", "skips"), "eval": tuple(EvalConfig.model_fields),
    "run": ("device", "sharding", "recompute", "compile", "log_every", "save_every_samples", "save_every_minutes", "keep",
            "mirror", "wandb")}  # files of [data] and [objective] may be elsewhere; other ones the cursor refuses
_INSTEAD = {"stream": "index", "index": "stream"}  # of [data]: one that is set takes the place of the other


def presets() -> dict[str, Path]:
    """Name → file of the presets that come with the package."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """A preset's name or a TOML file, with `a.b=value` overrides → Config. Raises InputError.

    A file may begin with `base = "…"`, a preset or a file beside it, whose settings hold wherever it says nothing.
    """
    path = presets().get(source, Path(source))
    return _checked(_read(path, source), overrides, path)


def _read(path: Path, source: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's settings upon those of its base."""
    if not path.is_file():
        near = difflib.get_close_matches(source, presets(), 1, 0.4)
        raise InputError(f"no configuration {source}: neither a TOML file nor a preset"
                         + (f"; did you mean {near[0]}?" if near else f" ({', '.join(presets())})"))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, a number or a byte that is none
        raise InputError(f"{path} is not TOML: {error}") from None
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or path.resolve() in above:
        raise InputError(f"{path}: base = {base!r} must name a preset or another file, and no file be its own base")
    return _upon(_read(presets().get(base, path.parent / base), base, (*above, path.resolve())), values)


def _upon(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in base.items() if _INSTEAD.get(key) not in values}
    both = {key: _upon(kept[key], value) for key, value in values.items()
            if isinstance(value, dict) and isinstance(kept.get(key), dict)}
    return kept | values | both


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration of a run that goes on with other settings. Raises InputError for one that must stay and would not."""
    run = config.run.folder
    before = config.model_dump(mode="json", exclude_none=True)
    wanted = _checked(deepcopy(before), overrides, run / "config.toml")
    after = wanted.model_dump(mode="json", exclude_none=True)
    for override in overrides:
        section, _, name = override.partition("=")[0].partition(".")
        key = name.partition(".")[0]
        if name not in MAY_CHANGE.get(section, ()) and before[section].get(key) != after[section].get(key):
            raise InputError(f"--set {override}: with another {section}.{name} it would be another run: `uniclip-train run "
                             f"{run}/config.toml --set {override} --set run.folder=…` starts one, with --set init.image={run} "
                             f"--set init.text={run} from the weights of this")
    return wanted


def as_changed(config: Config, later: Config) -> Config:
    """`config` with all that may change as `later` has it."""
    return config.model_copy(update={
        section: getattr(config, section).model_copy(update={name: getattr(getattr(later, section), name) for name in names})
        for section, names in MAY_CHANGE.items()})


def _checked(values: dict[str, Any], overrides: Sequence[str], path: Path) -> Config:
    for override in overrides:
        _set(values, override)
    _complete(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        set_here = {override.partition("=")[0] for override in overrides}
        raise InputError("; ".join(_explain(e, path, set_here) for e in error.errors())) from None


def _set(values: dict[str, Any], override: str) -> None:
    """Apply `a.b=value`; the value is TOML, or plain text where it is not."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write it as section.key=value, for example --set optim.lr=5e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override}: {parent!r} is a value, not a section")
    values[last] = value
    values.pop(_INSTEAD.get(last, ""), None)


def _complete(values: dict[str, Any]) -> None:
    """What a baseline is made of, wherever it is not said."""
    objective = values.get("objective")
    name = objective.get("name", "uniclip") if isinstance(objective, dict) else "uniclip"
    if name not in VIEWS:
        return
    for key, value in (BASELINE | {"data.recipe": name}).items():
        section, (*parents, last) = values, key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section.setdefault(last, value)


def _explain(error: Any, path: Path, set_here: set[str]) -> str:
    """One pydantic error as place, fault and cure."""
    place = ".".join(str(part) for part in error["loc"])
    where = f"--set {place}" if place in set_here else f"{path}: {place}"
    if error["type"] == "extra_forbidden":
        return f"{where} is an unknown key{_nearest(error['loc'])}"
    if error["type"] == "missing":
        return f"{where} is missing: set it in the file or with --set {place}=…"
    given = "" if isinstance(error["input"], dict) and not error["loc"] else f" = {error['input']!r}"
    return f"{where.removesuffix(': ')}{given}: {error['msg']}"


def _nearest(loc: tuple[int | str, ...]) -> str:
    """The nearest valid key beside an unknown one."""
    section: Any = Config
    for part in loc[:-1]:
        section = section.model_fields[part].annotation
    names = list(section.model_fields)
    prefix = "".join(f"{part}." for part in loc[:-1])
    near = [prefix + name for name in difflib.get_close_matches(str(loc[-1]), names, 2, 0.5)]
    return f"; did you mean {' or '.join(near)}?" if near else f"; known here: {', '.join(names)}"

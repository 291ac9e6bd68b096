"""A run is one TOML file: every preset loads, every wrong key is named with its cure."""

import ast
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.console import InputError
from pipeline.sampling import KINDS, ViewKind
from trainer.config import Config
from trainer.config_file import MAY_CHANGE, load_config, presets

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_survives_its_file(name, tmp_path):
    config = load_config(name)
    stored = tmp_path / "config.toml"
    stored.write_text(config.to_toml())
    assert load_config(str(stored)) == config


@pytest.mark.parametrize("name", presets())
def test_every_preset_says_command_cost_and_result(name):
    header = [line for line in presets()[name].read_text().splitlines() if line.startswith("#")]
    assert f"uniclip-train run {name}" in "\n".join(header)
    for word in ("command", "cost", "result"):
        assert any(re.match(rf"# {word} +\S", line) for line in header), word
    assert "TBD" not in "\n".join(header)


def test_a_file_stands_upon_its_base(tmp_path):
    (tmp_path / "own.toml").write_text('base = "other.toml"\n[model.image]\ndepth = 2\n[run]\nfolder = "r"\n')
    (tmp_path / "other.toml").write_text('base = "scenes-tiny"\n[model.image]\nwidth = 96\nheads = 3\n')
    own, tiny = load_config(str(tmp_path / "own.toml")), load_config("scenes-tiny")
    assert (own.model.image.depth, own.model.image.width, own.model.image.patch) == (2, 96, tiny.model.image.patch)
    assert (own.model.text, own.optim, own.run.folder.name) == (tiny.model.text, tiny.optim, "r")
    (tmp_path / "other.toml").write_text('base = "scenes-tiny"\n[data]\nstream = "a.tar"\n')
    assert (load_config(str(tmp_path / "own.toml")).data.stream, tiny.data.stream) == ("a.tar", None)
    for wrong, message in (("own.toml", "no file be its own base"), (f"../{tmp_path.name}/own.toml", "no file be its own base"),
                           ("nowhere", "no configuration nowhere"), (3, "base = 3")):
        (tmp_path / "other.toml").write_text(f"base = {wrong!r}\n")
        with pytest.raises(InputError, match=message):
            load_config(str(tmp_path / "own.toml"))


@pytest.mark.parametrize("override, message", [
    ("optim.lrr=1", "--set optim.lrr is an unknown key; did you mean optim.lr?"),
    ("model.image.sise=64", "--set model.image.sise is an unknown key; did you mean model.image.size?"),
    ("dat.index=x", "dat is an unknown key; did you mean data?"),
    ("optim.zzzz=1", "--set optim.zzzz is an unknown key; known here: samples"),
    ("optim.lr=fast", "optim.lr = 'fast'"),
    ("optim.lr=-1", "optim.lr = -1"),
    ("optim.lr.deep=1", "'lr' is a value, not a section"),
    ("optim.lr", "write it as section.key=value"),
    ("data.weak.area=[0.9,0.1]", "is no range"),
    ("data.weak.area=[0.9,1.1]", "data.weak.area = [0.9, 1.1]: Value error, is no range of shares of the image: "
                                 "give [low, high] with 0.001 ≤ low ≤ high ≤ 1"),
    ("data.weak.area=[nan,1]", "data.weak.area.0 = nan: Input should be a finite number"),
    ("data.weak.area=[0,1]", "0.001 ≤ low"),
    ("data.strong.aspect=[0.5,inf]", "finite"),
    ("data.strong.aspect=[-1,1]", "give [low, high] with 0.01 ≤ low ≤ high ≤ 100"),
    ("data.strong.blur_sigma=[0.1,2.1]", "a window of 13 pixels holds: give [low, high] with 0.01 ≤ low ≤ high ≤ 2"),
    ("data.strong.jitter=[0.4,0.4,-0.1,0.1]", "data.strong.jitter"),
    ("data.strong.jitter=[0.4,1.4,0.1,0.1]", "give brightness, contrast and saturation in 0 … 1 and hue in 0 … 0.5"),
    ("data.strong.jitter=[0.4,0.4,0.4,0.6]", "hue in 0 … 0.5"),
    ("data.strong.jitter=[0.4,0.4,nan,0.1]", "finite"),
    ("data.strong.blur_p=nan", "--set data.strong.blur_p"),
    ("data.read_timeout=inf", "--set data.read_timeout"),
    ("data.cache_gb=nan", "--set data.cache_gb"),
    ("data.recipe=[]", "data.recipe"),
    ("data.recipe=[\"uniclip\"]", "or a list of views from weak, medium, strong"),
    ("data.recipe=unclip", "give one of uniclip, 3weak, 3strong, clip, slip, declip"),
    ("data.views=[\"weak\"]", "--set data.views is an unknown key"),
    ("loss.name=clip", "loss.name"),
    ("run.device=banana", "run.device = 'banana'"),
    ("run.folder=s3://bucket/run", "a run lives in a local folder"),
    ("optim.betas=[1.5,2]", "optim.betas"),
    ("model.text.heads=5", "do not divide width"),
])
def test_wrong_values_are_named_with_place_and_cure(override, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_config("scenes-tiny", [override])


def test_separate_supervision_is_refused_where_it_is_undefined():
    with pytest.raises(InputError, match="undefined for supcon"):
        load_config("scenes-tiny", ["loss.name=supcon", "loss.supervision=separate"])


def test_a_partial_view_keeps_the_rest_of_its_kind():
    weak = load_config("scenes-tiny", ["data.weak.flip_p=0.5"]).data.weak
    assert (weak.flip_p, weak.area) == (0.5, (0.5, 1.0))


def test_the_documentation_lists_what_may_change_when_a_run_goes_on():
    page = (ROOT / "docs" / "training.md").read_text()
    for section, names in MAY_CHANGE.items():
        (row,) = re.findall(rf"^\| `{section}` \| (.*) \|$", page, re.MULTILINE)
        assert row == "all" and section == "eval" or set(re.findall(r"`(\w+)`", row)) == set(names)
        assert set(names) <= set(Config.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]


def test_overrides_are_toml_or_plain_text():
    config = load_config("scenes-tiny", ["optim.lr=5e-4", "data.index=some/where", "data.recipe=[\"weak\"]",
                                         "optim.samples=1_000"])
    assert (config.optim.lr, str(config.data.index), config.data.recipe, config.optim.samples) == (
        5e-4, str(Path("some/where").absolute()), ("weak",), 1000)


def test_a_missing_file_names_the_nearest_preset():
    with pytest.raises(InputError, match="did you mean scenes-tiny"):
        load_config("scene-tiny")


def test_a_file_that_is_no_toml_is_an_input_error(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("[data\n")
    with pytest.raises(InputError, match="is not TOML"):
        load_config(str(path))


def fields(model: type[BaseModel], section: str = "") -> set[tuple[str, str]]:
    """(section, field) of every value."""
    found = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields(kind, name)
        else:
            found.add((section, name))
    return found


def read(code: str) -> set[tuple[str, str]]:
    """(owner, name) of each `owner.name` that code reads; what an error message says of it is no use of it."""
    found, todo = set(), [ast.parse(code)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            found.add((owner, node.attr))
        if not isinstance(node, ast.Raise):
            todo.extend(ast.iter_child_nodes(node))
    return found


def unread(code: str, config: str) -> list[str]:
    """Fields that are read neither as `section.field` nor, where a function is given a section alone, as `config.field`.

    code: the trainer's but config.py, which hands some on.
    """
    elsewhere, handed_on = read(code), read("class Config:\n" + config[config.index("    def kinds"):])
    return [f"{section}.{name}" for section, name in sorted(fields(Config)) if section not in KINDS
            and not {(section, name), ("config", name)} & elsewhere and ("self", name) not in handed_on]


def test_every_field_is_read_somewhere():
    code = "\n".join(path.read_text() for path in sorted((ROOT / "trainer").glob("*.py")) if path.name != "config.py")
    config = (ROOT / "trainer" / "config.py").read_text()
    assert {name for section, name in fields(Config) if section in KINDS} <= set(ViewKind.__dataclass_fields__)  # as a whole
    assert unread(code, config) == []
    for field, only in (("optim.betas", "raise ValueError(f'{config.optim.betas} of optim.betas')\n"),
                        ("run.keep", "'run.keep'\n")):
        gone = re.sub(rf"\b(\w+\.)*{field.rpartition('.')[2]}\b(?!=)", "nothing", code) + only
        assert field in unread(gone, config), "an error message counts as a use"

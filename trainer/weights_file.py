"""A file of weights, ours or anybody's → tensors by name. Nothing in it runs, whatever it holds.

Pickles are read by torch's weights-only unpickler. Beside tensors, people's files hold settings and numbers
(argparse.Namespace, numpy scalars, paths): their classes are not called, an empty `_Stub` stands for each.
"""

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.console import InputError, WorkFailed

Weights = dict[str, Tensor]
_PLAIN = {"addict", "argparse", "collections", "copy_reg", "copyreg", "datetime", "easydict", "enum", "lightning",
          "lightning_fabric", "ml_collections", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "types", "typing", "uuid",
          "yacs"}  # packages whose classes people save beside weights
_ENVELOPES = ("state_dict", "model_state_dict", "model", "module", "weights", "net")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_SETTINGS = ("input_resolution", "context_length", "vocab_size")  # that OpenAI's files have among their weights
_PICKLES = 4  # in a file of torch before 1.6: magic, protocol, system, and what was saved
_AGAIN = "download it again, and compare its size with what its page says"
_NOT_WEIGHTS = {  # how a file begins → what it is, and the cure
    b"version https://git-lfs": ("a Git LFS pointer, not the weights", "run `git lfs pull` where it was cloned"),
    b"<!doctype": ("a web page, not weights", "download the file itself; a login page or a wrong link gives such a page"),
    b"<html": ("a web page, not weights", "download the file itself; a login page or a wrong link gives such a page"),
    b"<?xml": ("an XML answer, not weights", "download the file itself; a refused or expired link gives such an answer"),
    b"{": ("JSON text, not weights", "download the file itself; an error of a server looks so"),
    b"\x1f\x8b": ("a gzip archive", "unpack it, and give the weights file inside")}


class _Stub:
    """Stands for an object that is no tensor: takes whatever it is given and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Stub":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_weights(path: Path) -> Weights:
    """Anybody's safetensors or torch.save file, whatever its name: a state_dict, bare or inside {"model": …} and the like.

    Raises InputError with the cure for a file that is something else, cut short, or holds code.
    """
    with path.open("rb") as file:
        head = file.read(512)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise InputError(f"{path} is empty: {_AGAIN}")
    if path.suffix == ".safetensors" and not _named(start) or head[8:9] == b"{":
        return read_safetensors(path)
    if found := _named(start):
        raise InputError(f"{path} is {found[0]}: {found[1]}")
    return _state_dict(read_pickle(path, stubs=True), path)


def _named(start: bytes) -> tuple[str, str] | None:
    return next((told for magic, told in _NOT_WEIGHTS.items() if start.startswith(magic)), None)


def read_safetensors(path: Path) -> Weights:
    """A safetensors file. Raises InputError when it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:  # KeyError: a dtype torch does not have
        raise InputError(f"{path} is cut short or damaged ({one_line(error)}): {_AGAIN}") from None


def read_pickle(path: Path, stubs: bool = False) -> Any:
    """What torch.save wrote, with tensors on the CPU. stubs: let a `_Stub` stand for settings and numbers of other packages.

    Raises InputError when it is cut short, or names what is neither a tensor nor plain.
    """
    try:
        names = sorted(_globals(path)) if stubs else []
        known: list[Any] = [(_Stub, name) for name in names if name.partition(".")[0] in _PLAIN]
        with torch.serialization.safe_globals(known):
            return torch.load(path, weights_only=True, map_location="cpu")
    except InputError:
        raise
    except OSError:
        raise
    except Exception as error:  # of a crafted pickle nearly anything
        _refuse(path, error)


def _globals(path: Path) -> set[str]:
    """What the file's pickles name, read without running them."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return {name for _ in range(_PICKLES) for name in _names(file)}
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        if "constants.pkl" in members:
            raise InputError(f"{path} is a TorchScript program, which runs when it is opened: where you trust it, write its "
                             f"weights once with torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')")
        if "data.pkl" not in members:
            raise InputError(f"{path} is a zip archive without weights of torch.save: unpack it, or give another file")
        if sum(member.file_size for member in members.values()) > path.stat().st_size:
            raise InputError(f"{path} unpacks to more than it holds, which torch.save never writes: {_AGAIN}")
        return set(_names(BytesIO(archive.read(members["data.pkl"]))))


def _names(file: Any) -> Iterator[str]:
    return (str(given).replace(" ", ".") for op, given, _ in pickletools.genops(file) if op.name == "GLOBAL")


def _refuse(path: Path, error: Exception) -> NoReturn:
    told = str(error)
    _, _, name = told.partition("GLOBAL ")
    if isinstance(error, pickle.UnpicklingError) and name:
        raise InputError(f"{path} holds {name.split()[0]}, which is code and no weight; it was not run: get the weights as "
                         "safetensors, or where you trust the file save its state_dict alone") from None
    raise InputError(f"{path} is no whole file of torch.save ({one_line(error)}): {_AGAIN}") from None


def one_line(error: Exception) -> str:
    """What a library says, as one line of readable length."""
    told = " ".join(str(error).split())
    return told if 0 < len(told) < 200 else f"{told[:200]}…" if told else type(error).__name__


def _state_dict(saved: Any, path: Path) -> Weights:
    """The tensors by name in what torch.save was given. Raises InputError where there are none."""
    found = saved
    for name in _ENVELOPES:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    weights = {name: x for name, x in found.items() if isinstance(x, Tensor)} if isinstance(found, dict) else {}
    if not weights or not all(isinstance(name, str) for name in weights):
        keys = ", ".join(map(str, list(saved)[:8])) if isinstance(saved, dict) else type(saved).__name__
        raise InputError(f"{path} holds no weights by name (found: {keys or 'nothing'}): save model.state_dict()")
    weights = {name: x for name, x in weights.items() if name not in _SETTINGS}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): x for name, x in weights.items()}
    return weights


def refuse_misfits(model: nn.Module, weights: Weights, path: Path, described: str) -> None:
    """Raises InputError that names the first tensor of a file that the model has not, or has in another shape."""
    wanted = model.state_dict()
    for name in (*wanted, *weights):
        mine, theirs = (_form(tensors.get(name)) for tensors in (wanted, weights))
        if mine != theirs:
            raise InputError(f"{path} does not fit the model that {described} describes: {name!r} is {theirs} in the file and "
                             f"{mine} in the model")


def _form(x: Tensor | None) -> str:
    return "missing" if x is None else f"{'' if x.is_floating_point() else f'{x.dtype} '}{tuple(x.shape)}"


@contextmanager
def fitting(path: Path, to: str, cure: str = "use another checkpoint") -> Iterator[None]:
    """Within, what a file holds is put to use; where that goes wrong it is the file's fault: an InputError.

    What the work itself met, such as a full GPU or a rank that ended, stays what it is.
    """
    try:
        yield
    except (InputError, WorkFailed, torch.AcceleratorError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        raise InputError(f"{path} does not fit {to} ({one_line(error)}): {cure}") from None

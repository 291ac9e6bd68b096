"""Class names and templates → one embedding a class. C classes, P prompts a class, D embedding.

Published ImageNet numbers use different template sets: SLIP's seven and OpenAI's eighty. A result says which.
"""

import hashlib
import json
from collections.abc import Callable, Sequence

from torch import Tensor

from pipeline.console import InputError
from pipeline.evalsets import EvalSet, rendered
from trainer.metrics import ensembled

OWN, OWN_OR_NAME = "set", "set, imagenet-7, imagenet-80 or name"


def published(attribute: str) -> tuple[str, ...]:
    """One of open_clip's template lists, with {c} for the class."""
    import open_clip

    return tuple(template("{c}") for template in getattr(open_clip, attribute))


TEMPLATE_SETS: dict[str, Callable[[EvalSet], tuple[str, ...]]] = {
    OWN: lambda evalset: evalset.templates,
    "imagenet-7": lambda evalset: published("SIMPLE_IMAGENET_TEMPLATES"),  # SLIP's, and the paper's
    "imagenet-80": lambda evalset: published("OPENAI_IMAGENET_TEMPLATES"),
    "name": lambda evalset: ("{c}",),
}


def chosen(name: str, evalset: EvalSet) -> tuple[str, ...]:
    """The templates a set is evaluated with. Raises InputError for an unknown name."""
    if name not in TEMPLATE_SETS:
        raise InputError(f"--templates {name}: give {OWN_OR_NAME}")
    return TEMPLATE_SETS[name](evalset)


def described(name: str, templates: Sequence[str]) -> str:
    """How a result row names its templates."""
    return f"{len(templates)} templates" + (" of the set" if name == OWN else f" ({name})")


def prompts_sha256(classnames: Sequence[str], templates: Sequence[str]) -> str:
    """Hash of every prompt in order, so that other templates, names or another order of classes are told apart."""
    return hashlib.sha256(json.dumps(rendered(classnames, templates)).encode()).hexdigest()


def class_embeddings(encode: Callable[[list[str]], Tensor], classnames: Sequence[str],
                     templates: Sequence[str]) -> Tensor:
    """(C, D). All prompts go through `encode` together: batches that stop at class borders are mostly empty."""
    return ensembled(encode(rendered(classnames, templates)), len(classnames))

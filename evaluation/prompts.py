"""Class names and templates → one embedding a class. C classes, P prompts a class, D embedding."""

import hashlib
import json
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F


def rendered(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every prompt, class by class: C·P texts."""
    return [template.replace("{c}", name) for name in classnames for template in templates]


def prompts_sha256(classnames: Sequence[str], templates: Sequence[str]) -> str:
    """Hash of every prompt in order, so that other templates, names or another order of classes are told apart."""
    return hashlib.sha256(json.dumps(rendered(classnames, templates)).encode()).hexdigest()


def class_embeddings(encode: Callable[[list[str]], Tensor], classnames: Sequence[str],
                     templates: Sequence[str]) -> Tensor:
    """(C, D): each prompt normalised, averaged over the templates, normalised (CLIP's ensembling).

    All prompts go through `encode` together: batches that stop at class borders are mostly empty.
    """
    z_CPD = encode(rendered(classnames, templates)).unflatten(0, (len(classnames), len(templates)))
    return F.normalize(F.normalize(z_CPD, dim=-1).mean(dim=1), dim=-1)

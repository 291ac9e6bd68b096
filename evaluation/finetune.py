"""Fine-tuning the image tower on a classification set: the recipe ViTs are fine-tuned with on ImageNet.

AdamW with layer-wise learning rates, warm-up and cosine, timm's augmentation, mixup and cutmix, label smoothing. The
head starts at zero, so that the first steps do not tear the features. Everything random is drawn from (seed, epoch), so
a run stopped anywhere goes on as if it had not been. B batch, N images, C classes.
"""

import copy
import hashlib
import io
import math
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim._optim_factory import create_optimizer_v2
from torch import Tensor, nn

from evaluation.catalogue import mean_per_class_is_main
from evaluation.evaluate import Bench, record
from evaluation.outcomes import Ranks
from evaluation.probe import VALIDATION
from evaluation.results import Row
from evaluation.subject import Subject
from evaluation.task import Finding, Plan
from evaluation.zeroshot import scores
from pipeline.console import InputError, say, track
from pipeline.evalsets import CLASSIFICATION, EvalSet, open_evalset, splits_of
from pipeline.files import replacing
from pipeline.images import upright_rgb
from pipeline.schema import MEAN, STD
from pipeline.seals import Damaged, has_trailer, with_trailer, without_trailer
from trainer.batches import IMAGE_BATCH
from trainer.metrics import ranks_in
from trainer.weights_file import one_line

STATE = "state.pt"
_RANGES = {"lr": (1e-8, 10.0), "layer_decay": (0.01, 1.0), "mixup": (0.0, 100.0), "cutmix": (0.0, 100.0),
           "smallest_crop": (0.001, 1.0), "erasing": (0.0, 1.0), "seed": (0, 2**32 - 1)}


@dataclass(frozen=True)
class Recipe:
    """What a fine-tuning run depends on beside weights and data. augment: timm's auto_augment, or empty for none.

    The defaults are for small towers and thousands of pictures: of two recipes that saw clothing.tar's training split for 16
    epochs they had 46.9 % of its validation split right, mixup, cutmix, RandAugment, erasing, crops from 0.3 and a decay of
    0.75 36.4 %. Large towers and ImageNet want those. A learning rate of 3e-4 had 46.9 % of the same split right, 1e-3 46.0 %
    (another model, level); on CIFAR-10's validation split 47.5 % against 42.4 %.
    """

    epochs: int = 16
    batch_size: int = 32
    lr: float = 3e-4
    layer_decay: float = 0.9
    mixup: float = 0.0
    cutmix: float = 0.0
    weight_decay: float = 0.05
    smoothing: float = 0.1
    warmup: float = 0.1
    smallest_crop: float = 0.5
    augment: str = ""
    erasing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a value that no training can use, before a model is loaded."""
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:  # false for NaN too
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name):g}: give a number from {low:g} to {high:g}")
        try:
            _augmentation(224, self)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise InputError(f"--augment {self.augment}: {error}; give one that timm knows, such as rand-m9-mstd0.5-inc1") \
                from None

    def __str__(self) -> str:
        return "fine-tuned, " + ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def finetune(bench: Bench, folder: Path, recipe: Recipe, split: str = "test") -> list[Row]:
    """Fine-tune on train, and on validation too unless that is what is measured, then measure `split` once → its rows.

    Goes on with what an earlier call left. Raises InputError for a set that cannot be trained on, or a model without a
    tower of timm's.
    """
    require_tower(bench.subject)
    plan = _plan(open_evalset(folder, split), folder, recipe)
    return record("finetune", bench, plan, lambda job: _measure(bench.subject, plan, recipe, job.scratch))


def require_tower(subject: Subject) -> None:
    """Raises InputError where the layers are not timm's, whose order the learning rates follow."""
    tower = getattr(getattr(subject.model, "image", None), "vit", None)
    if not isinstance(tower, VisionTransformer):
        raise InputError(f"{subject.name} cannot be fine-tuned: only runs, checkpoints and exports of uniclip-train have the "
                         "timm tower that its recipe needs; `uniclip-eval probe` takes any model")


def _plan(evalset: EvalSet, folder: Path, recipe: Recipe) -> Plan:
    if evalset.kind != CLASSIFICATION or "train" not in splits_of(folder) or evalset.split == "train":
        raise InputError(f"{folder} cannot be fine-tuned on: it needs labels and a split 'train' beside {evalset.split!r}")
    names = ["train"] if evalset.split in VALIDATION else \
        [name for name in ("train", *VALIDATION) if name in splits_of(folder)]
    splits = {"test": evalset} | {name: open_evalset(folder, name) for name in names}
    return Plan("+".join(split.manifest_sha256 for split in splits.values()), None, str(recipe), splits)


def _measure(subject: Subject, plan: Plan, recipe: Recipe, scratch: Path) -> Finding:
    images, label_N = _read([split for role, split in plan.splits.items() if role != "test"])
    test_images, test_N = _read([plan.splits["test"]])
    classes = int(max(label_N.max(), test_N.max())) + 1
    model = _train(subject, images, label_N, classes, recipe, scratch)
    logits_NC = _predict(model, subject, test_images)
    right_NC = nn.functional.one_hot(torch.as_tensor(test_N), classes).bool()
    ranks: Ranks = {"class": (ranks_in(logits_NC, right_NC).numpy(), test_N)}
    return Finding(scores(ranks, classes, recipe.seed, mean_per_class_is_main(plan.splits["test"].name)), ranks,
                   details=asdict(recipe) | {"train_images": len(images)})


def _read(splits: list[EvalSet]) -> tuple[list[bytes], np.ndarray]:
    examples = [example for split in splits for example in split.examples()]
    return [image for _, image, _ in examples], np.array([label for *_, label in examples], np.int64)


def _train(subject: Subject, images: list[bytes], label_N: np.ndarray, classes: int, recipe: Recipe,
           scratch: Path) -> VisionTransformer:
    """The loop: pictures, mixed; forward, loss, backward, step; saved after every epoch."""
    torch.manual_seed(recipe.seed)
    model = _classifier(subject, classes)
    optimizer = create_optimizer_v2(model, "adamw", recipe.lr, recipe.weight_decay, layer_decay=recipe.layer_decay)
    mix = Mixup(recipe.mixup, recipe.cutmix, prob=float(recipe.mixup > 0 or recipe.cutmix > 0),
                label_smoothing=recipe.smoothing, num_classes=classes)
    steps, loss_of = max(1, len(images) // recipe.batch_size), SoftTargetCrossEntropy()
    for epoch in track(range(_resumed(scratch, model, optimizer), recipe.epochs), "fine-tuning"):
        model.train()
        for step, (image_BCHW, label_B) in enumerate(_batches(subject, images, label_N, recipe, epoch, steps)):
            _set_rate(optimizer, recipe, (epoch * steps + step) / (recipe.epochs * steps))
            mixed_BCHW, target_BC = mix(image_BCHW, label_B)
            loss = loss_of(model(mixed_BCHW), target_BC)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        _save(scratch, model, optimizer, epoch + 1)
        say(f"epoch {epoch + 1}/{recipe.epochs}  loss {loss.item():.3f}")
    return model


def _classifier(subject: Subject, classes: int) -> VisionTransformer:
    """A copy of the tower with a linear head of zeros in the place timm has for it, so that timm knows its layers."""
    image: Any = subject.model.image
    model: VisionTransformer = copy.deepcopy(image.vit)
    model.reset_classifier(classes)
    nn.init.zeros_(model.head.weight)  # type: ignore[arg-type]
    nn.init.zeros_(model.head.bias)  # type: ignore[arg-type]
    return model.to(subject.device)


def _batches(subject: Subject, images: list[bytes], label_N: np.ndarray, recipe: Recipe, epoch: int,
             steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch in its own order, everything random seeded by (seed, epoch)."""
    import random

    seed = int.from_bytes(hashlib.sha256(f"{recipe.seed} {epoch}".encode()).digest()[:4], "big")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # timm's mixup draws from the global generator
    order = np.random.default_rng(seed).permutation(len(images))
    augment = _augmentation(_size(subject), recipe)
    for step in range(steps):
        rows = order[step * recipe.batch_size:(step + 1) * recipe.batch_size]
        rows = rows[:len(rows) // 2 * 2]  # mixup pairs pictures
        pictures = torch.stack([augment(upright_rgb(images[row])) for row in rows])  # in turn: the draws are shared
        yield pictures.to(subject.device), torch.as_tensor(label_N[rows], device=subject.device)


def _augmentation(size: int, recipe: Recipe) -> Any:
    return create_transform(size, is_training=True, scale=(recipe.smallest_crop, 1), hflip=0.5,
                            auto_augment=recipe.augment or None, re_prob=recipe.erasing, interpolation="bicubic",
                            mean=MEAN, std=STD)


def _size(subject: Subject) -> int:
    image: Any = subject.model.image
    return image.size


def _set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, done: float) -> None:
    """Linear warm-up, then a cosine to zero, times each layer's own scale."""
    rate = done / recipe.warmup if done < recipe.warmup else \
        0.5 + 0.5 * math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup))
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * rate * group.get("lr_scale", 1.0)


def _save(scratch: Path, model: VisionTransformer, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epochs}, file)
    with replacing(scratch / STATE) as temporary:
        temporary.write_bytes(with_trailer(file.getvalue()))


def _resumed(scratch: Path, model: VisionTransformer, optimizer: torch.optim.Optimizer) -> int:
    """Epochs already done; the folder's name says with which recipe, weights and data."""
    if not (scratch / STATE).exists():
        return 0
    data = (scratch / STATE).read_bytes()
    try:
        data = without_trailer(data) if has_trailer(data) else data  # older versions wrote none
        saved = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (Damaged, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{scratch / STATE} is damaged ({one_line(error)}): remove it to begin again") from None
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    say(f"resuming {scratch} after {saved['epochs']} epochs")
    return saved["epochs"]


@torch.inference_mode()
def _predict(model: VisionTransformer, subject: Subject, images: list[bytes]) -> Tensor:
    """(N, C) logits of whole pictures, as every other task sees them."""
    model.eval()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = [model(torch.from_numpy(np.stack(list(pool.map(subject.view, images[at:at + IMAGE_BATCH])))).to(
            subject.device)).cpu() for at in range(0, len(images), IMAGE_BATCH)]
    return torch.cat(parts)

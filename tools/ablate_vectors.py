"""What the augmentation embedding is worth when a trained model is used: `python -m tools.ablate_vectors SET RUN [RUN …]`.

Every image of a captioned set is seen as evaluation sees it (its central square), as a weak view, and in each way the run was
trained with. Its embedding is then computed with the vector that made the view, with the identity, and with another image's
vector; of a model without the embedding once, for it takes none. --side adds random squares: how apparent size shifts recall.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from pipeline.console import InputError, run, say
from pipeline.evalsets import RETRIEVAL, EvalSet, open_evalset
from pipeline.images import upright_rgb
from pipeline.replay import PillowExecutor, center_crop
from pipeline.sampling import ViewKind, sample_vectors
from pipeline.schema import IDENTITY, sample_id_of
from tools.grid_tables import mean_and_error
from trainer.batches import IMAGE_BATCH
from trainer.distributed import pick_device
from trainer.export import open_model
from trainer.metrics import retrieval_recalls
from trainer.model import UniCLIP

VECTORS = ("true", "identity", "shuffled")
CENTRE = "central square"
METRIC = "image_to_text_recall@1"


def _squares(central_NA: np.ndarray, side: float) -> np.ndarray:
    """Vectors (N, 11) of squares anywhere in the images, `side` times as wide as the central ones."""
    square_NA = central_NA.copy()
    square_NA[:, 2:4] *= side
    square_NA[:, :2] = np.random.default_rng(0).random((len(central_NA), 2)) * (1 - square_NA[:, 2:4])
    return square_NA


def _features(model: UniCLIP, images: list[bytes], size: int, kinds: dict, sides: Sequence[float], device: str
              ) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Way of seeing → features of its views (N, W) and the vectors (N, 11) that made them."""
    ids, size_N2 = np.array([sample_id_of(image) for image in images]), np.array([upright_rgb(x).size for x in images])
    central_NA = np.stack([center_crop(*each) for each in size_N2.tolist()])
    squares_NVA = np.stack([central_NA, *(_squares(central_NA, side) for side in sides)], axis=1)
    vector_NVA = np.concatenate([squares_NVA, sample_vectors(0, 0, 0, ids, size_N2, tuple(kinds.values()))], axis=1)
    executor, parts = PillowExecutor(size), []
    for start in range(0, len(images), IMAGE_BATCH):
        part = slice(start, start + IMAGE_BATCH)
        views, _, _ = executor(images[part], vector_NVA[part], ids[part])
        parts.append([model.image_features(view.to(device)) for view in views])
    executor.close()
    names = (CENTRE, *(f"square of {side:g}" for side in sides), *kinds)
    return {name: (torch.cat(h_of_parts), vector_NVA[:, v])
            for v, (name, h_of_parts) in enumerate(zip(names, zip(*parts, strict=True), strict=True))}


@torch.inference_mode()
def recalls(place: Path, evalset: EvalSet, device: str = "cpu", sides: Sequence[float] = ()
            ) -> dict[tuple[str, str], dict[str, float]]:
    """(way of seeing, vector) → recalls; "true" alone where a model takes no vector. Raises InputError."""
    loaded = open_model(place, device)
    model = loaded.model
    examples = list(evalset.examples())
    captions = [caption for _, _, own in examples if isinstance(own, list) for caption in own]
    image_of_text_T = np.repeat(np.arange(len(examples)), [len(own) for _, _, own in examples if isinstance(own, list)])
    token_TL = torch.from_numpy(loaded.tokenizer(captions)).to(device)
    text_TD = torch.cat([model.encode_text(part) for part in token_TL.split(IMAGE_BATCH)])
    data = loaded.config.data
    kinds = {"weak": ViewKind(**vars(data.weak))} | dict(zip(data.view_names(), data.kinds(), strict=True))  # of two alike one
    found = {}
    images = [image for _, image, _ in examples]
    for name, (h_NW, vector_NA) in _features(model, images, loaded.image_size, kinds, sides, device).items():
        order_N = np.random.default_rng(0).permutation(len(vector_NA))
        given = {"true": vector_NA, "identity": np.tile(IDENTITY, (len(vector_NA), 1)), "shuffled": vector_NA.copy()}
        given["shuffled"][order_N] = vector_NA[np.roll(order_N, 1)]  # nobody keeps its own
        for which in VECTORS if model.augmentation else VECTORS[:1]:
            z_ND = model.project_image(h_NW, torch.from_numpy(given[which]).to(device))
            found[name, which] = retrieval_recalls(z_ND, text_TD, image_of_text_T)
    return found


def table(found: list[dict[tuple[str, str], float]]) -> str:
    """Markdown: mean ± standard error over runs, and the difference to the true vector, run by run."""
    what = f"mean ± standard error over {len(found)} runs" if len(found) > 1 else "of one run"
    lines = [f"{METRIC} in percent, {what}; in brackets against the true vector.",
             "", f"| seen as | {' | '.join(VECTORS)} |", "|---" * (1 + len(VECTORS)) + "|"]
    for name in dict.fromkeys(name for name, _ in found[0]):
        cells = []
        for which in VECTORS:
            if (name, which) not in found[0]:
                cells.append("")
                continue
            mean, error = mean_and_error([100 * one[name, which] for one in found])
            drop, drop_error = mean_and_error([100 * (one[name, which] - one[name, "true"]) for one in found])
            cells.append(f"{mean:.1f}{_error(error)}" + ("" if which == "true" else f" ({drop:+.1f}{_error(drop_error)})"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _error(error: float) -> str:
    """Nothing for a single run, which has no standard error."""
    return "" if math.isnan(error) else f" ± {error:.1f}"


def main(evalset: Annotated[Path, typer.Argument(help="A captioned evaluation set.")],
         runs: Annotated[list[Path], typer.Argument(help="Runs or checkpoints of one configuration, differing in the seed.")],
         device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
         sides: Annotated[list[float], typer.Option("--side", min=0.05, max=1.0, help="Random squares too, of this side, as a "
                                                    "share of the shorter edge; repeatable.")] = [],  # noqa: B006
         out: Annotated[Path | None, typer.Option(help="Also write every figure to this JSON file.")] = None) -> None:
    """Retrieval with the true, the identity and a shuffled augmentation vector.

    Example: `python -m tools.ablate_vectors demo/scenes/evalsets/retrieval runs/scenes-tiny`
    """
    wanted = open_evalset(evalset)
    if wanted.kind != RETRIEVAL:
        raise InputError(f"{evalset} is no captioned set: give one with captions")
    found = [{seen: of[METRIC] for seen, of in recalls(place, wanted, pick_device(device, "--device "), sides).items()}
             for place in runs]
    if other := [place for place, one in zip(runs, found, strict=True) if one.keys() != found[0].keys()]:
        raise InputError(f"{other[0]} has other views or another head than {runs[0]}: give runs of one configuration")
    if out:
        out.write_text(json.dumps([{"run": str(place), "seen_as": name, "vector": which, METRIC: value}
                                   for place, one in zip(runs, found, strict=True) for (name, which), value in one.items()],
                                  indent=1) + "\n", encoding="utf-8")
    say(table(found))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run(app)

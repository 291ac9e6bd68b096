"""Steps that went wrong, kept so that they can be run again: RUN/failures/000001600/.

The folder is a checkpoint without optimizer (the weights the step met), with each rank's batch: ids, vectors, tokens,
random state. Pixels follow from index and vectors; a stream has no index, there the views are kept too.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.console import InputError, WorkFailed, say
from pipeline.schema import Batch
from trainer import checkpoint
from trainer.config import Config
from trainer.distributed import Ranks, pick_device, process_group
from trainer.objectives import Objective
from trainer.parallel import whole
from trainer.step import global_loss
from trainer.training import Training, restored, snapshot
from trainer.weights_file import fitting, read_safetensors

KEPT = 3
BATCH = ("vectors", "tokens", "sample_id", "group_id", "valid")


class Skips:
    """Updates that were left out because loss or gradient were not finite; past the budget the run ends."""

    def __init__(self, run: Path, budget: int):
        self._run, self._budget = run, budget

    def skip(self, config: Config, t: Training, batch: Batch, loss: Tensor, gradient: Tensor) -> None:
        """Keep the step for `replay`, on all ranks together. Raises WorkFailed past the budget."""
        t.skipped += 1
        folder = self._run / checkpoint.FAILURES / f"{t.cursor.samples_seen:012d}"
        try:
            _keep(folder, config, t, batch)
            again = f"`uniclip-train replay {folder}` runs the step again"
        except WorkFailed as error:  # a full disk is no reason to end the run
            again = f"it cannot be run again: {error}"
        what = (f"loss {loss.item():.4g}, gradient norm {gradient.item():.4g} at {t.cursor.samples_seen:,} samples are not "
                f"finite")
        if t.skipped > self._budget:
            raise WorkFailed(f"{what}, the {t.skipped}. such step, more than optim.skips = {self._budget}; weights are as of "
                             f"the step before; {again}; resume with --set optim.skips=…, or start anew with a lower optim.lr "
                             "or run.precision=fp32")
        if t.ranks.rank == 0:
            say(f"left out an update: {what} ({t.skipped} of at most {self._budget}); {again}")


def _keep(folder: Path, config: Config, t: Training, batch: Batch) -> None:
    """Write the step, and remove older ones; nothing of it stays where a rank cannot. Raises WorkFailed on all ranks."""
    taken, told = snapshot(config, t, 0.0, with_optimizer=False), _told(batch, keep_views=config.data.index is None)
    weights = [*t.model.state_dict().values(), *(t.average.weights.values() if t.average else ())]
    needed = sum(x.numel() * x.element_size() for x in [*weights, *[*told.values()] * t.ranks.world])
    cure = f"a step needs {needed / 2**20:,.1f} MiB, make room there"
    try:
        with t.ranks.agreeing(), checkpoint.writing(folder, cure):
            if t.ranks.rank == 0:
                checkpoint.write(folder, taken)
                for old in sorted(path for path in folder.parent.iterdir() if path != folder)[:1 - KEPT]:
                    shutil.rmtree(old)
        with t.ranks.agreeing(), checkpoint.writing(folder, cure):
            save_file(told, folder / f"rank{t.ranks.rank}.safetensors")
    except WorkFailed:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _told(batch: Batch, keep_views: bool) -> dict[str, Tensor]:
    kept = {name: getattr(batch, name) for name in BATCH} | {"rng": torch.get_rng_state()}
    views = {f"view{v}": view for v, view in enumerate(batch.views)} if keep_views else {}
    return {name: x.detach().cpu().contiguous() for name, x in (kept | views).items()}


def replay(folder: Path) -> None:
    """Run a kept step again and say what is not finite: loss, parts of the gradient, samples of all ranks. Raises InputError.

    As many processes as it was on repeat it exactly; any other number runs the same global batch.
    """
    kept = sorted(folder.glob("rank*.safetensors"))
    if not kept:
        raise InputError(f"{folder} holds no step to replay: give a folder inside RUN/{checkpoint.FAILURES}/")
    config = checkpoint.load_model(folder, average=False).config
    with process_group(config.optim.batch_size, pick_device(config.run.device)) as (ranks, device):
        _, t = restored(folder, device, ranks)
        with fitting(folder, "this run"):
            told_B, rng = _share(kept, ranks)
        batch = _batch(config, t, told_B)
        if rng is not None:
            torch.set_rng_state(rng)
        objective = Objective(config, ranks, t.model.auxiliary)
        loss, _ = global_loss(config.optim, t, objective, batch)
        for line in _findings(t, objective, batch, loss):  # on all ranks: it asks them all
            if ranks.rank == 0:
                say(line)


def _share(kept: list[Path], ranks: Ranks) -> tuple[dict[str, Tensor], Tensor | None]:
    """What was kept of this rank's share of the batch; the random state where there are as many ranks as there were."""
    told = [read_safetensors(path) for path in kept]
    count = sum(len(rank["valid"]) for rank in told)
    mine = slice(ranks.rank * count // ranks.world, (ranks.rank + 1) * count // ranks.world)
    told_B = {name: torch.cat([rank[name] for rank in told])[mine] for name in {*told[0]} - {"rng"} | {*BATCH}}
    return told_B, told[ranks.rank]["rng"] if len(kept) == ranks.world else None


def _batch(config: Config, t: Training, told_B: dict[str, Tensor]) -> Batch:
    """This rank's share of the step's batch, checked against what was kept of it."""
    if config.data.index is None:
        views = [told_B[f"view{v}"] for v in range(told_B["vectors"].shape[1])]
        return Batch(views, *(told_B[name] for name in BATCH)).to(t.device)
    loader = t.data.loader(t.tokenizer, t.recipe, t.cursor, config.optim.batch_size, t.device, t.ranks.rank, t.ranks.world)
    batch = loader.batch_at(t.cursor.samples_seen)  # type: ignore[union-attr]  # an index has one
    loader.close()
    for name in BATCH:
        if not torch.equal(getattr(batch, name).cpu(), told_B[name]):
            raise WorkFailed(f"the batch at {t.cursor.samples_seen:,} samples has other {name} than the kept step's: "
                             "samples were taken down since then, or their shards are damaged")
    return batch


def _findings(t: Training, objective: Objective, batch: Batch, loss: Tensor) -> list[str]:
    lines = [f"step {t.step + 1} at {t.cursor.samples_seen:,} samples: loss {loss.item():.6g}"]
    for name, part in t.model.named_children():
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        if gradients:
            lines.append(f"  gradient norm of {name}: {whole(nn.utils.get_total_norm(gradients)).item():.6g}")
    for name, z_BXD in (("image", objective.image_BVD), ("text", objective.text_BTD)):
        wrong_B = ~torch.isfinite(z_BXD).flatten(1).all(1)
        ids = [one for rank in t.ranks.told(batch.sample_id[wrong_B].tolist()) for one in rank]
        lines.append(f"  {name} embeddings that are not finite: {len(ids)}"
                     + (f", of samples {', '.join(map(str, ids[:10]))}" if ids else ""))
    wrong = [name for name, p in t.model.named_parameters() if not torch.isfinite(whole(p)).all()]
    return [*lines, f"  weights that are not finite: {', '.join(wrong) or 'none'}"]

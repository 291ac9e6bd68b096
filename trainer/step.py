"""One step, as training makes it, `replay` repeats it and `check` tries it."""

from torch import Tensor, nn

from pipeline.console import WorkFailed
from pipeline.schema import Batch
from trainer.accumulation import chunks, forward_backward
from trainer.batches import without_padding
from trainer.config import OptimConfig
from trainer.log import LEDGER
from trainer.losses import NoValidGroup
from trainer.objectives import Objective
from trainer.parallel import whole
from trainer.training import Training


def global_loss(optim: OptimConfig, t: Training, objective: Objective, batch: Batch) -> tuple[Tensor, int]:
    """The loss of the global batch, and with how many columns texts were encoded; its gradient is left in the parameters.

    `batch` is this rank's share. Raises WorkFailed, on all ranks, where nothing of the batch could be decoded.
    """
    t.optimizer.zero_grad(set_to_none=True)
    tokens = without_padding(batch.tokens, t.tokenizer.end_id)
    count = min(optim.accumulation, optim.batch_size // t.ranks.world)
    parts = chunks(count, batch.views, batch.vectors, tokens)
    try:
        return forward_backward(t.step_of, parts, objective.of(batch), t.ranks), tokens.shape[2]
    except NoValidGroup as error:
        raise WorkFailed(f"{error}: no image before {t.cursor.samples_seen + optim.batch_size:,} samples could be decoded, see "
                         f"{LEDGER} of the run") from None


def clipped(optim: OptimConfig, t: Training) -> Tensor:
    """The gradient's norm, before it is cut to `optim.clip`; where weights are sharded all ranks must call it."""
    return whole(nn.utils.clip_grad_norm_(t.model.parameters(), optim.clip))


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norm of each part's gradient; where weights are sharded all ranks must call it."""
    gradients = {name: [p.grad for p in part.parameters() if p.grad is not None] for name, part in model.named_children()}
    return {name: whole(nn.utils.get_total_norm(part)).item() for name, part in gradients.items() if part}


def update(optim: OptimConfig, t: Training, objective: Objective, batch: Batch) -> None:
    """The weights, their average, and what the objective remembers."""
    t.optimizer.step()
    t.model.similarity.clamp_()
    objective.keep(batch)
    if t.average:
        t.average.update(optim.batch_size)

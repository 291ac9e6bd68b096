"""What a run minimises, of the global batch, and what the log says of it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.schema import Batch
from trainer.config import Config
from trainer.diagnostics import diagnose, loss_bounds
from trainer.distributed import Ranks
from trainer.similarity import comparable_offsets
from trainer.tiles import tiled_loss


class Objective:
    """The loss as `forward_backward` calls it; keeps this rank's embeddings, τ and b of its last step for the log.

    B groups on this rank, V views, T texts, D embedding. Embeddings are normalised in float32 whatever the towers' precision.
    """

    image_BVD: Tensor
    text_BTD: Tensor
    temperature_3: Tensor
    offset_3: Tensor

    def __init__(self, config: Config, ranks: Ranks):
        self._loss, self._ranks, self._dim = config.loss, ranks, config.model.dim
        self._groups = config.optim.batch_size
        self._dtype = torch.bfloat16 if config.run.precision == "bf16" else None

    def of(self, batch: Batch) -> Callable[..., Tensor]:
        """The loss of this batch's embeddings."""
        return partial(self, batch)

    def __call__(self, batch: Batch, image_BVD: Tensor, text_BTD: Tensor, temperature_3: Tensor, offset_3: Tensor) -> Tensor:
        self.image_BVD, self.text_BTD = image_BVD.detach().float(), text_BTD.detach().float()
        self.temperature_3, self.offset_3 = temperature_3.detach().clone(), offset_3.detach().clone()
        return tiled_loss(self._loss.name, image_BVD.float(), text_BTD.float(), temperature_3, offset_3,
                          self._loss.supervision, batch.group_id, batch.valid, ranks=self._ranks, dtype=self._dtype)

    def numbers(self, batch: Batch) -> dict[str, float | list[float]]:
        """What the log says beside the loss: where it could be, τ and b, and how embeddings of this rank's groups lie."""
        floor, chance = loss_bounds(self._loss.name, self._loss.supervision, self._groups, self.image_BVD.shape[1],
                                    self.text_BTD.shape[1], self._dim, self.temperature_3, self.offset_3)
        return {"floor_loss": floor, "chance_loss": chance, "temperature": self.temperature_3.tolist(),
                "offset": comparable_offsets(self.temperature_3, self.offset_3).tolist(),
                "duplicates": 1 - len(batch.group_id.unique()) / max(len(batch.group_id), 1),
                **diagnose(self.image_BVD, self.text_BTD, self.temperature_3, self.offset_3, batch.group_id, batch.valid)}

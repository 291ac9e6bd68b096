"""The loss family without the matrix: Λ from tiles, positives blockwise, gradients from tiles computed again (METHOD §6).

B groups, V views, T texts, S = V + T, D embedding, C = 1 or 2 kinds of Λ for each row (unified or separate). R = S·B rows
sorted by modality, then by group id: a tile of them has one τ and one b, and meets equal ids only near the diagonal.

ℓ is symmetric, so one tile serves its rows and its columns. Where other ranks hold groups too, each computes Λ of its own
rows and gets everybody's. As g = ∂L/∂Λ follows from Λ and the embeddings of all, the loss is the global one on every rank,
and the backward pass needs no communication.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer import tiles_torch
from trainer.distributed import ALONE, Ranks
from trainer.losses import formula_of, logits_within, pair_up, unit
from trainer.tiles_torch import Patch, Softmax, inner

TILE = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Tile:
    """Consecutive rows of one modality, and the group ids they run through."""

    rows: slice
    is_text: int
    low: int
    high: int


@dataclass(frozen=True)
class Layout:
    """Groups, sorted by id, as rows: all their images, then all their texts, in tiles."""

    id_R: Tensor
    groups: int
    views: int
    texts: int
    tiles: list[Tile]

    @classmethod
    def of(cls, id_B: Tensor, views: int, texts: int, tile: int) -> "Layout":
        """Tiles of at most `tile` rows."""
        images, end = len(id_B) * views, len(id_B) * (views + texts)
        cuts = [(start, min(start + tile, stop), is_text) for is_text, first, stop in ((0, 0, images), (1, images, end))
                for start in range(first, stop, tile)]
        id_R = torch.cat([id_B.repeat_interleave(views), id_B.repeat_interleave(texts)])
        ends = torch.tensor([(start, stop - 1) for start, stop, _ in cuts], dtype=torch.long).view(-1, 2)
        edges = id_R[ends.to(id_R.device)].tolist()
        return cls(id_R, len(id_B), views, texts, [Tile(slice(start, stop), is_text, *edge)
                                                   for (start, stop, is_text), edge in zip(cuts, edges, strict=True)])

    def by_row(self, x_BSC: Tensor) -> Tensor:
        """→ (R, C)."""
        return torch.cat([x_BSC[:, :self.views].flatten(0, 1), x_BSC[:, self.views:].flatten(0, 1)])

    def parts(self, x_RC: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `by_row`, without a copy → (B, V, C), (B, T, C)."""
        image_RC, text_RC = x_RC.split([self.groups * self.views, self.groups * self.texts])
        return image_RC.view(self.groups, self.views, x_RC.shape[1]), text_RC.view(self.groups, self.texts, x_RC.shape[1])

    def by_group(self, x_RC: Tensor) -> Tensor:
        """The inverse of `by_row` → (B, S, C)."""
        return torch.cat(self.parts(x_RC), dim=1)


Backend = tuple[Callable[[Patch], tuple[Tensor, Tensor]],
                Callable[[Patch, Softmax, Softmax], tuple[Tensor, Tensor, Tensor]]]


def _triton() -> Backend:
    from trainer import tiles_triton  # not installed everywhere

    return tiles_triton.log_sums, tiles_triton.weights


def _auto(device: torch.device) -> str:
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"


BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": lambda: (tiles_torch.log_sums, tiles_torch.weights),
    "triton": _triton,
}


@dataclass(frozen=True)
class Visit:
    """A tile of the matrix: own rows, and columns that are own or foreign."""

    row: Tile
    column: Tile
    foreign: bool

    @property
    def domain(self) -> int:
        """Index of the domain pair."""
        return self.row.is_text + self.column.is_text

    @property
    def mirrored(self) -> bool:
        """Whether the tile also stands for its transpose, which is not visited."""
        return not self.foreign and self.row is not self.column


@dataclass(frozen=True)
class Plan:
    """Which tiles are computed and how; `exchange` gives the Λ of foreign groups for those of own groups."""

    own: Layout
    foreign: Layout
    kinds: int
    domains: tuple[bool, bool, bool]
    temperature_3: list[float]
    offset_3: list[float]
    backend: Backend
    exchange: Callable[[Tensor], Tensor]

    def visits(self) -> Iterator[Visit]:
        """Every tile of own rows; of a tile and its transpose one."""
        for n, row in enumerate(self.own.tiles):
            for visit in (*(Visit(row, column, False) for column in self.own.tiles[n:]),
                          *(Visit(row, column, True) for column in self.foreign.tiles)):
                if self.domains[visit.domain]:
                    yield visit

    def patch(self, visit: Visit, z_RD: Tensor, foreign_RD: Tensor) -> Patch:
        """The tile's part of the data."""
        row, column = visit.row, visit.column
        layout, column_RD = (self.foreign, foreign_RD) if visit.foreign else (self.own, z_RD)
        shared = row.low <= column.high and column.low <= row.high
        return Patch(z_RD[row.rows], column_RD[column.rows], 1 / self.temperature_3[visit.domain],
                     self.own.id_R[row.rows] if shared else None, layout.id_R[column.rows] if shared else None)

    def shift(self, visit: Visit) -> float:
        """b / τ: what cos / τ is above ℓ."""
        return self.offset_3[visit.domain] / self.temperature_3[visit.domain]

    def kind(self, column: Tile) -> int:
        """Which Λ of a row its pairs with `column` belong to."""
        return column.is_text if self.kinds == 2 else 0


class _LogNegatives(torch.autograd.Function):
    """Λ of own groups, then of foreign ones, from embeddings in the rows of their layouts → (B, S, C)."""

    @staticmethod
    def forward(ctx, z_RD, foreign_RD, temperature_3, offset_3, plan: Plan):
        log_RC = z_RD.new_full((len(z_RD), plan.kinds), -torch.inf, dtype=torch.promote_types(z_RD.dtype, torch.float32))
        log_sums, _ = plan.backend
        for visit in plan.visits():
            row, column = visit.row, visit.column
            of_row_T, of_column_U = log_sums(plan.patch(visit, z_RD, foreign_RD))
            _log_add_(log_RC[row.rows, plan.kind(column)], of_row_T - plan.shift(visit))
            if visit.mirrored:
                _log_add_(log_RC[column.rows, plan.kind(row)], of_column_U - plan.shift(visit))
        own_BSC = plan.own.by_group(log_RC)
        log_BSC = torch.cat([own_BSC, plan.exchange(own_BSC)])
        ctx.save_for_backward(z_RD, foreign_RD, temperature_3, offset_3, log_BSC)
        ctx.plan = plan
        return log_BSC

    @staticmethod
    @once_differentiable
    def backward(ctx, g_BSC):
        z_RD, foreign_RD, temperature_3, offset_3, log_BSC = ctx.saved_tensors
        with torch.autocast(z_RD.device.type, enabled=False):
            gradient_RD, sum_3, product_3 = _gradients(ctx.plan, z_RD, foreign_RD, log_BSC, g_BSC)
            slope_3 = -sum_3 / temperature_3
            return gradient_RD, None, -(product_3 + slope_3 * offset_3) / temperature_3, slope_3, None


def _log_add_(total: Tensor, term: Tensor) -> None:
    torch.logaddexp(total, term, out=total)


def _gradients(plan: Plan, z_RD: Tensor, foreign_RD: Tensor, log_BSC: Tensor, g_BSC: Tensor
               ) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂z of own rows, complete; Σ G and Σ G · cos / τ by domain pair, this rank's share.

    The share is half of what own rows see, in both orders: each pair is seen from both of its ends.
    """
    lift = _lift(g_BSC, z_RD.dtype)
    own, foreign = _softmax(plan, log_BSC, g_BSC * lift)
    gradient_RD = torch.zeros_like(z_RD, dtype=log_BSC.dtype)
    sum_3, product_3 = log_BSC.new_zeros(3), log_BSC.new_zeros(3)
    _, weights = plan.backend
    for visit in plan.visits():
        row, column = visit.row, visit.column
        patch, shift = plan.patch(visit, z_RD, foreign_RD), plan.shift(visit)
        s_TU, total, product = weights(patch, _rows(own, row, plan.kind(column), shift),
                                       _rows(foreign if visit.foreign else own, column, plan.kind(row), shift))
        share = 1 if visit.mirrored else 0.5
        sum_3[visit.domain] += share * total
        product_3[visit.domain] += share * product
        s_TU = s_TU.to(z_RD.dtype)
        gradient_RD[row.rows].add_(inner(s_TU, patch.b_UD.T), alpha=patch.scale)
        if visit.mirrored:
            gradient_RD[column.rows].add_(inner(s_TU.T, patch.a_TD.T), alpha=patch.scale)
    return gradient_RD.div_(lift).to(z_RD.dtype), sum_3 / lift, product_3 / lift


def _softmax(plan: Plan, log_BSC: Tensor, g_BSC: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(Λ, g) of own and of foreign rows. A row without negatives has Λ = −inf and no part in any sum: exp(ℓ − inf) = 0."""
    log_BSC = log_BSC.masked_fill(log_BSC == -torch.inf, torch.inf)
    sizes = [plan.own.groups, plan.foreign.groups]
    return [(layout.by_row(log), layout.by_row(g)) for layout, log, g in
            zip((plan.own, plan.foreign), log_BSC.split(sizes), g_BSC.split(sizes), strict=True)]


def _rows(log_and_g: tuple[Tensor, Tensor], tile: Tile, kind: int, shift: float) -> Softmax:
    log_RC, g_RC = log_and_g
    return Softmax(log_RC[tile.rows, kind] + shift, g_RC[tile.rows, kind])


def _lift(g_BSC: Tensor, dtype: torch.dtype) -> Tensor | float:
    """float16 has no exponents for g ~ 1/M: bring the largest to 4096."""
    return 4096 / g_BSC.abs().max().clamp(min=torch.finfo(g_BSC.dtype).tiny) if dtype == torch.float16 else 1.0


def _domains(name: str, supervision: str, views: int, texts: int) -> tuple[bool, bool, bool]:
    """Which domain pairs have a Λ that the loss needs: separate ones without positives have none."""
    alone = supervision == "separate" and name == "multi_positive_infonce"
    return (views > 1 or not alone, True, texts > 1 or not alone)


def _pick(x_BSD: Tensor, index: Tensor) -> Tensor:
    """`x_BSD[index]`, without a copy where that is everything in order."""
    same = len(index) == len(x_BSD) and bool((index == torch.arange(len(x_BSD), device=index.device)).all())
    return x_BSD if same else x_BSD[index]


def tiled_loss(name: str, image_BVD: Float[Tensor, "B V D"], text_BTD: Float[Tensor, "B T D"],
               temperature_3: Float[Tensor, "3"], offset_3: Float[Tensor, "3"], supervision: str = "unified",
               group_id: Int[Tensor, "B"] | None = None, valid: Bool[Tensor, "B"] | None = None, *,
               ranks: Ranks = ALONE, tile: int | None = None, dtype: torch.dtype | None = None,
               backend: str | None = None) -> Float[Tensor, ""]:
    """The member `name` of losses.FORMULAS, as losses.dense_loss has it, in memory O(M·D + tile²), M = S·B.

    The groups given are this rank's of a global batch. The value is the global loss on every rank; gradients of embeddings
    are the global loss's, those of τ and b this rank's share of it. `dtype` is the precision of embeddings in tiles and on
    the wire (theirs when None); sums are in float32 at least.
    """
    formula = formula_of(name, supervision)
    device, views, texts = image_BVD.device, image_BVD.shape[1], text_BTD.shape[1]
    tile = tile or TILE.get(device.type, TILE["cuda"])
    with torch.autocast(device.type, enabled=False):
        groups = ranks.groups(len(image_BVD), group_id, valid, device)
        own, foreign = (Layout.of(ids, views, texts, tile) for ids in (groups.own_id, groups.foreign_id))
        plan = Plan(own, foreign, 1 if supervision == "unified" else 2, _domains(name, supervision, views, texts),
                    temperature_3.tolist(), offset_3.tolist(), BACKENDS[backend or _auto(device)](), groups.exchange)
        dtype = dtype or torch.promote_types(image_BVD.dtype, text_BTD.dtype)
        z_RD = torch.cat([unit(_pick(x, groups.own)).to(dtype).flatten(0, 1) for x in (image_BVD, text_BTD)])
        foreign_RD = foreign.by_row(groups.exchange(own.by_group(z_RD.detach())))
        log_negatives_BSC = _LogNegatives.apply(z_RD, foreign_RD, temperature_3, offset_3, plan)
        logit_BSS = torch.cat([_within(own, z_RD, temperature_3, offset_3),
                               _within(foreign, foreign_RD, temperature_3.detach(), offset_3.detach())])
        return formula(pair_up(logit_BSS, log_negatives_BSC, views))


def _within(layout: Layout, z_RD: Tensor, temperature_3: Tensor, offset_3: Tensor) -> Tensor:
    precise_RD = z_RD.float() if z_RD.element_size() < 4 else z_RD
    return logits_within(*layout.parts(precise_RD), temperature_3, offset_3)

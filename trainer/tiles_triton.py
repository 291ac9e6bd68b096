"""One tile on CUDA: the product and all that follows it in one kernel, so that the logits never leave the chip.

T rows, U columns, D embedding. A program computes one block of the tile. Products are as precise as torch's own: TF32 only
where torch.backends allows it. float64 goes to PyTorch.
"""

# pyright: reportArgumentType=false
# Triton's `constexpr` parameters take plain values.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer import tiles_torch
from trainer.tiles_torch import Patch, Softmax

BLOCK, DEPTH = 128, 64
SMALL = 16  # tl.dot takes no less


@triton.jit
def _cosines(a, b, row, column, rows, columns, depth, a_stride, b_stride,
             DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """a · bᵀ of a block, in float32."""
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = tl.load(a + row[:, None] * a_stride + k, (row[:, None] < rows) & (k < depth), 0.0)
        y = tl.load(b + column[:, None] * b_stride + k, (column[:, None] < columns) & (k < depth), 0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    return total


@triton.jit
def _taking_part(row, column, rows, columns, row_id, column_id, SHARED: tl.constexpr):
    """Pairs inside the tile that are not of one group, nor of groups of equal id."""
    inside = (row[:, None] < rows) & (column < columns)
    if SHARED:
        i = tl.load(row_id + row, row < rows, 0)
        j = tl.load(column_id + column, column < columns, 0)
        inside = inside & (i[:, None] != j)
    return inside


@triton.jit
def _log_sum(x, AXIS: tl.constexpr):
    """log Σ exp; −inf where everything is."""
    highest = tl.max(x, AXIS)
    empty = highest == float("-inf")
    total = tl.sum(tl.exp(x - tl.expand_dims(tl.where(empty, 0.0, highest), AXIS)), AXIS)
    return tl.log(tl.where(empty, 1.0, total)) + highest


@triton.jit
def _log_sums(a, b, of_row, of_column, row_id, column_id, rows, columns, depth, a_stride, b_stride, scale,
              SHARED: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """log Σ exp of the block's rows and columns: of_row (blocks, T), of_column (blocks, U)."""
    n, m = tl.program_id(0), tl.program_id(1)
    row, column = n * BLOCK + tl.arange(0, BLOCK), m * BLOCK + tl.arange(0, BLOCK)
    x = _cosines(a, b, row, column, rows, columns, depth, a_stride, b_stride, DEPTH, PRECISION) * scale
    x = tl.where(_taking_part(row, column, rows, columns, row_id, column_id, SHARED), x, float("-inf"))
    tl.store(of_row + m * rows + row, _log_sum(x, 1), row < rows)
    tl.store(of_column + n * columns + column, _log_sum(x, 0), column < columns)


@triton.jit
def _weights(a, b, s, sums, products, row_shift, row_g, column_shift, column_g, row_id, column_id, rows, columns, depth,
             a_stride, b_stride, scale,
             SHARED: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """S of the block, and its Σ S and Σ S · cos / τ."""
    n, m = tl.program_id(0), tl.program_id(1)
    row, column = n * BLOCK + tl.arange(0, BLOCK), m * BLOCK + tl.arange(0, BLOCK)
    x = _cosines(a, b, row, column, rows, columns, depth, a_stride, b_stride, DEPTH, PRECISION) * scale
    i_shift, i_g = tl.load(row_shift + row, row < rows, 0.0), tl.load(row_g + row, row < rows, 0.0)
    j_shift, j_g = tl.load(column_shift + column, column < columns, 0.0), tl.load(column_g + column, column < columns, 0.0)
    weight = tl.exp(x - i_shift[:, None]) * i_g[:, None] + tl.exp(x - j_shift) * j_g
    weight = tl.where(_taking_part(row, column, rows, columns, row_id, column_id, SHARED), weight, 0.0)
    inside = (row[:, None] < rows) & (column < columns)
    tl.store(s + row[:, None] * columns + column, weight.to(s.dtype.element_ty), inside)
    place = n * tl.num_programs(1) + m
    tl.store(sums + place, tl.sum(weight))
    tl.store(products + place, tl.sum(weight * x))


def _options(patch: Patch) -> dict[str, Any]:
    exact = torch.get_float32_matmul_precision() == "highest" or not patch.a_TD.is_cuda
    block = BLOCK if patch.a_TD.is_cuda else SMALL
    return {"SHARED": patch.id_T is not None, "BLOCK": block, "DEPTH": min(block, DEPTH),
            "PRECISION": "ieee" if exact else "tf32", "num_warps": 8, "num_stages": 3}


def _sizes(patch: Patch) -> tuple[tuple[int, int], list]:
    """The grid, and the arguments that both kernels take: ids, sizes, strides, 1 / τ."""
    (rows, depth), columns, block = patch.a_TD.shape, len(patch.b_UD), _options(patch)["BLOCK"]
    return ((triton.cdiv(rows, block), triton.cdiv(columns, block)),
            [patch.id_T, patch.id_U, rows, columns, depth, patch.a_TD.stride(0), patch.b_UD.stride(0), patch.scale])


def log_sums(patch: Patch) -> tuple[Tensor, Tensor]:
    """tiles_torch.log_sums."""
    if patch.a_TD.dtype == torch.float64:
        return tiles_torch.log_sums(patch)
    (n, m), arguments = _sizes(patch)
    of_row = patch.a_TD.new_empty(m, len(patch.a_TD), dtype=torch.float32)
    of_column = patch.a_TD.new_empty(n, len(patch.b_UD), dtype=torch.float32)
    _log_sums[n, m](patch.a_TD, patch.b_UD, of_row, of_column, *arguments, **_options(patch))
    return of_row.logsumexp(0), of_column.logsumexp(0)


def weights(patch: Patch, row: Softmax, column: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """tiles_torch.weights, S in the precision of the embeddings."""
    if patch.a_TD.dtype == torch.float64:
        return tiles_torch.weights(patch, row, column)
    (n, m), arguments = _sizes(patch)
    s_TU = patch.a_TD.new_empty(len(patch.a_TD), len(patch.b_UD))
    sums, products = patch.a_TD.new_empty(2, n * m, dtype=torch.float32)
    vectors = [x.contiguous() for x in (row.shift_T, row.gradient_T, column.shift_T, column.gradient_T)]
    _weights[n, m](patch.a_TD, patch.b_UD, s_TU, sums, products, *vectors, *arguments, **_options(patch))
    return s_TU, sums.sum(), products.sum()

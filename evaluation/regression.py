"""Multinomial logistic regression by L-BFGS, on the CPU or on CUDA, from cold or from another solution.

scikit-learn's objective: mean cross-entropy + |w|²/(2·C·N), the intercept free, with C = 1/λ. Solved in coordinates in
which its curvature is near the identity (features rotated onto their principal axes, each axis scaled by the curvature
of the loss plus that of the penalty), where L-BFGS needs a tenth of the steps. In float64: float32 leaves logits 1e-2 from
the minimum, enough to turn a close answer from run to run. N images, W features, R rank, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MAX_STEPS = 1000  # CLIP's
SEARCH, EXACT = 1e-6, 1e-8  # tolerances of the gradient in the scaled coordinates: logits right to 1e-4 and to 1e-5


@dataclass(frozen=True)
class Linear:
    """Logits = features @ weight + bias."""

    weight_WC: Tensor
    bias_C: Tensor

    def logits(self, h_NW: Tensor) -> Tensor:
        """(N, C) on the device of the weights."""
        return h_NW.to(self.bias_C.device, self.bias_C.dtype) @ self.weight_WC + self.bias_C


class Problem:
    """A training set whose factorisation is done once and serves every λ."""

    def __init__(self, h_NW: Tensor, label_N: np.ndarray, classes: int, device: torch.device):
        h_NW = h_NW.to(device, torch.float64)
        self.mean_W = h_NW.mean(dim=0)
        centred_NW = h_NW - self.mean_W
        value_R, axes_WR = torch.linalg.eigh(centred_NW.T @ centred_NW)  # W × W: cheaper than an SVD of N × W
        kept = value_R > value_R.max() * 1e-12
        self.axes_WR, self.spread_R = axes_WR[:, kept], value_R[kept] / len(h_NW)
        self.x_NR = centred_NW @ self.axes_WR
        self.label_N = torch.as_tensor(label_N, device=device)
        self.classes = classes

    def solve(self, penalty: float, start: Linear | None = None, tolerance: float = SEARCH) -> Linear:
        """The minimum for λ = `penalty`, sought from `start`."""
        curvature = (1 - 1 / self.classes) / self.classes
        scale_R = (curvature * self.spread_R + penalty / len(self.x_NR)) ** -0.5
        v_CR, bias_C1 = (x.requires_grad_() for x in self._begin(start, scale_R))
        weight = penalty / (2 * len(self.x_NR))
        search = torch.optim.LBFGS([v_CR, bias_C1], max_iter=MAX_STEPS, max_eval=2 * MAX_STEPS, tolerance_grad=tolerance,
                                   tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            weight_CR = scale_R * v_CR
            logit_CN = weight_CR @ self.x_NR.T + bias_C1  # classes first: a third of the time of images first
            loss = F.nll_loss(logit_CN.log_softmax(dim=0).T, self.label_N) + weight * weight_CR.square().sum()
            loss.backward()
            return loss

        search.step(closure)
        weight_WC = self.axes_WR @ (scale_R * v_CR.detach()).T
        return Linear(weight_WC, bias_C1.detach()[:, 0] - self.mean_W @ weight_WC)

    def _begin(self, start: Linear | None, scale_R: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and intercept of `start`, or zeros, in the scaled coordinates."""
        if start is None:
            return scale_R.new_zeros(self.classes, len(scale_R)), scale_R.new_zeros(self.classes, 1)
        return (start.weight_WC.T @ self.axes_WR) / scale_R, (start.bias_C + self.mean_W @ start.weight_WC)[:, None]

"""Multinomial logistic regression by L-BFGS, on the CPU or on CUDA, from cold or from another solution.

scikit-learn's objective: mean cross-entropy + |w|²/(2·C·N), the intercept free, with C = 1/λ. Solved in coordinates in
which its curvature is near the identity (features rotated onto their principal axes, each axis scaled by the curvature
of the loss plus that of the penalty), where L-BFGS needs a tenth of the steps. N images, W features, R rank, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MAX_STEPS = 1000  # CLIP's
TOLERANCE = 1e-6  # of the gradient in the scaled coordinates


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
        h_NW = h_NW.to(device, torch.float32)
        self.mean_W = h_NW.mean(dim=0)
        centred_NW = (h_NW - self.mean_W).double()
        value_R, axes_WR = torch.linalg.eigh(centred_NW.T @ centred_NW)  # W × W: cheaper than an SVD of N × W
        kept = value_R > value_R.max() * 1e-12
        self.axes_WR, self.spread_R = axes_WR[:, kept], value_R[kept] / len(h_NW)
        self.x_NR = (centred_NW @ self.axes_WR).float()
        self.label_N = torch.as_tensor(label_N, device=device)
        self.classes = classes

    def solve(self, penalty: float, start: Linear | None = None) -> Linear:
        """The minimum for λ = `penalty`, sought from `start`."""
        curvature = (1 - 1 / self.classes) / self.classes
        scale_R1 = ((curvature * self.spread_R + penalty / len(self.x_NR)) ** -0.5)[:, None].float()
        x_NR = self.x_NR * scale_R1.T  # penalty in these coordinates: |scale · v|²
        v_RC = self._begin(start, scale_R1).requires_grad_()
        bias_C = (torch.zeros(self.classes, device=x_NR.device) if start is None else
                  self._centred_bias(start)).requires_grad_()
        weight = penalty / (2 * len(x_NR))
        search = torch.optim.LBFGS([v_RC, bias_C], max_iter=MAX_STEPS, max_eval=2 * MAX_STEPS, tolerance_grad=TOLERANCE,
                                   tolerance_change=1e-10, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            loss = F.cross_entropy(x_NR @ v_RC + bias_C, self.label_N) + weight * (scale_R1 * v_RC).square().sum()
            loss.backward()
            return loss

        search.step(closure)
        weight_WC = self.axes_WR.float() @ (scale_R1 * v_RC.detach())
        return Linear(weight_WC, bias_C.detach() - self.mean_W @ weight_WC)

    def _begin(self, start: Linear | None, scale_R1: Tensor) -> Tensor:
        if start is None:
            return torch.zeros(len(scale_R1), self.classes, device=scale_R1.device)
        return (self.axes_WR.T.float() @ start.weight_WC) / scale_R1

    def _centred_bias(self, start: Linear) -> Tensor:
        return start.bias_C + self.mean_W @ start.weight_WC

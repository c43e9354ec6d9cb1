"""Muon: momentum whose matrices are orthogonalised, and Adam for all that is no matrix.

In a few thousand steps, all that a CPU grants, it gets further than Adam does. Matrices
are scaled to the update size of Adam, so that one learning rate serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# A quintic iteration that drives singular values towards 1 (Jordan et al., 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor, dtype: torch.dtype = torch.float32, iterations: int = 5) -> Tensor:
    """The nearest matrix with singular values of about 1, worked out in `dtype`.

    Each iteration multiplies by a polynomial of the Gram matrix. In float32 the product is gathered in the
    small space of the shorter side, since the factors commute, and applied once: a convolution's weights are
    many times longer than wide. In bfloat16, whose rounding that would multiply, and whose products are
    several times faster where the CPU has them, each factor is applied as it comes.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    if dtype == torch.bfloat16:
        for _ in range(iterations):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    else:
        gram = x @ x.T
        product = identity = torch.eye(len(gram), dtype=dtype, device=gram.device)
        for _ in range(iterations):
            factor = a * identity + b * gram + c * gram @ gram
            product = factor @ product
            gram = factor @ gram @ factor
        x = product @ x
    x = x.to(matrix.dtype)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Weights of two or more dimensions are matrices of (outputs, everything else)."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        sparse: Iterable[Tensor] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`sparse` are matrices that Adam shall have all the same: embeddings; `dtype` is for
        `orthogonalised`."""
        self.dtype = dtype
        unsuited = {id(p) for p in sparse}
        chosen = list(parameters)
        matrices = [p for p in chosen if p.ndim > 1 and id(p) not in unsuited]
        others = [p for p in chosen if p.ndim < 2 or id(p) in unsuited]
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__(
            [{"params": matrices, "matrix": True}, {"params": others, "matrix": False}], defaults
        )

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            update = self._matrix_update if group["matrix"] else self._adam_update
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                change = update(parameter, group)
                if group["matrix"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(change, alpha=group["lr"])

    def _matrix_update(self, parameter: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        ahead = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
        # Adam's updates have a root mean square of about 0.2 to 0.4; so shall these.
        scale = 0.2 * math.sqrt(max(ahead.shape))
        return scale * orthogonalised(ahead, self.dtype).view(parameter.shape)

    def _adam_update(self, parameter: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].lerp_(parameter.grad.square(), 1 - second)
        mean = state["mean"] / (1 - first ** state["step"])
        square = state["square"] / (1 - second ** state["step"])
        return mean / (square.sqrt() + 1e-8)

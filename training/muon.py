"""Muon: momentum whose matrices are orthogonalised, and Adam for all that is no matrix.

In a few thousand steps, all that a CPU grants, it gets further than Adam does. Matrices
are scaled to the update size of Adam, so that one learning rate serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

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


def shared_out(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalised` of each matrix. Processes that train together have the same ones, so that each works
    out a share of them and gets the rest from the others."""
    if not distributed.is_initialized():
        return [orthogonalised(matrix, dtype) for matrix in matrices]
    loads = [0] * distributed.get_world_size()
    flat = matrices[0].new_zeros(sum(matrix.numel() for matrix in matrices))
    parts = [
        part.view_as(matrix)
        for part, matrix in zip(flat.split([m.numel() for m in matrices]), matrices, strict=True)
    ]
    for k in sorted(range(len(matrices)), key=lambda k: -matrices[k].numel() * min(matrices[k].shape)):
        least = loads.index(min(loads))
        loads[least] += matrices[k].numel() * min(matrices[k].shape)
        if least == distributed.get_rank():
            parts[k].copy_(orthogonalised(matrices[k], dtype))
    distributed.all_reduce(flat)
    return parts


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
            updated = [p for p in group["params"] if p.grad is not None]
            if not group["matrix"]:
                for parameter in updated:
                    parameter.sub_(self._adam_update(parameter, group), alpha=group["lr"])
                continue
            ahead = [self._momentum(parameter, group).flatten(1) for parameter in updated]
            for parameter, change in zip(updated, shared_out(ahead, self.dtype), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                # Adam's updates have a root mean square of about 0.2 to 0.4; so shall these.
                scale = 0.2 * math.sqrt(max(change.shape))
                parameter.sub_(change.view(parameter.shape), alpha=group["lr"] * scale)

    def _momentum(self, parameter: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(momentum, group["momentum"])

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

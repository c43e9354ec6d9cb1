"""What a layer hands to PyTorch's fused attention: to be heard, or answered in another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attend_excite.interrupts import to_the_end

Answer = Callable[..., Tensor]
"""(scaled_dot_product_attention, and what it was called with) -> what the layer gets for it."""


class _Answering(TorchFunctionMode):
    """Answers the first call of fused attention while a layer runs."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer
        self.asked = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and not self.asked:
            self.asked = True
            return self._answer(function, *args, **kwargs)
        return function(*args, **kwargs)


@contextmanager
def fused_attention_answered(layer: nn.Module, name: str, answer: Answer) -> Iterator[None]:
    """In the block a layer's fused attention is answered by a function, once a pass.

    In whatever thread the layer runs: gradient checkpointing runs it again in that of the way back. Where one
    block stands inside another, the outer one's answer is asked first, and asks the inner one.

    Args:
        layer: the attention layer.
        name: for people.
        answer: see `Answer`.
    """

    def answered(*args: Any, **kwargs: Any) -> Any:
        with _Answering(answer) as answering:
            output = forward(*args, **kwargs)
        if not answering.asked:
            raise ValueError(
                f"the attention of {name} can't be read: its processor doesn't hand it to PyTorch's fused "
                "attention; set the model's attention backend to native, and take xformers and processors of "
                "others out with set_default_attn_processor()"
            )
        return output

    replaced = vars(layer).get("forward")  # by another library, as for offloading
    forward = layer.forward

    def restore() -> None:
        if replaced is None:
            vars(layer).pop("forward", None)
        else:
            layer.forward = replaced

    try:
        layer.forward = answered
        yield
    finally:
        to_the_end(restore)

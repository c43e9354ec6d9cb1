"""Whether an error says that memory ran out, which is no fault of the prompt or of the model's files."""

from __future__ import annotations

# Of CUDA, of Windows, and of torch on a CPU, which has no type for it.
_SIGNS = ("out of memory", "not enough memory", "allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device; by its first line, since torch's go on for pages."""
    first = str(error).strip().split("\n", 1)[0]
    # The second is torch's own type, of accelerators, known by its name: nothing here needs torch.
    typed = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return typed or any(sign in first for sign in _SIGNS)

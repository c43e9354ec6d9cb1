"""Taking turns: what two threads must not use at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

_turns: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_making = Lock()


@contextmanager
def turn_of(*shared: Any) -> Iterator[None]:
    """In the block no other thread has its turn with any of these objects; None among them is nobody's.

    A run puts hooks into a network and freezes it; a tokenizer keeps the padding and the truncation of its
    last call. A thread whose turn it is may take it again.
    """
    with ExitStack() as stack:
        for each in shared:
            if each is not None:
                with _making:
                    lock = _turns.setdefault(each, RLock())
                stack.enter_context(lock)
        yield

"""Wrappers around the host's own functions, and copies of its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    CALC_COND_BATCH = "calc_cond_batch"


def add_wrapper_with_key(
    wrapper_type: str, key: str, wrapper: Any, transformer_options: dict, is_model_options: bool = False
) -> None:
    if is_model_options:
        transformer_options = transformer_options.setdefault("transformer_options", {})
    kinds = transformer_options.setdefault("wrappers", {})
    kinds.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)


def copy_nested_dicts(input_dict: dict) -> dict:
    copies: dict = {}
    for key, value in input_dict.items():
        if isinstance(value, dict):
            value = copy_nested_dicts(value)
        copies[key] = list(value) if isinstance(value, list) else value
    return copies


class WrapperExecutor:
    """What a wrapper is handed to go on with."""

    def __init__(
        self, original: Callable, class_obj: Any, wrappers: Sequence[Callable], idx: int = 0
    ) -> None:
        self.original, self.class_obj, self.wrappers, self.idx = original, class_obj, wrappers, idx

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        following = WrapperExecutor(self.original, self.class_obj, self.wrappers, self.idx + 1)
        return following.execute(*args, **kwargs)

"""What nodes are declared with."""

from __future__ import annotations

from typing import Any


class ComfyExtension:
    pass


class _Kind:
    """A type of input and output."""

    class Input:
        def __init__(self, id: str, **kwargs: Any) -> None:
            self.id, self.options = id, kwargs

    class Output:
        def __init__(self, **kwargs: Any) -> None:
            self.options = kwargs


class io:  # noqa: N801
    class ComfyNode:
        pass

    class Schema:
        def __init__(
            self,
            node_id: str,
            display_name: str = "",
            category: str = "sd",
            inputs: Any = None,
            outputs: Any = None,
            description: str = "",
            is_output_node: bool = False,
        ) -> None:
            self.node_id, self.inputs, self.outputs = node_id, inputs, outputs

    class NodeOutput:
        def __init__(self, *args: Any, ui: Any = None) -> None:
            self.args, self.ui = args, ui

    Clip = Combo = Conditioning = Float = Image = Int = Latent = Mask = Model = String = _Kind

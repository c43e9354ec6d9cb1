"""What the host calls a model, and how its attention is read: the only module that knows architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TokenTable:
    """A table of tokens that the model attends to.

    Attributes:
        name: for people.
        key: of its tokens among those that the host's tokenizer gives.
        encoders: the parts of the host's text encoder of which one at least fills it.
        prompt_tokens_only: see `attend_excite.subjects.Stream`.
    """

    name: str
    key: str
    encoders: tuple[str, ...]
    prompt_tokens_only: bool = True


@dataclass(frozen=True)
class Architecture:
    """How a model that the host has loaded is nursed.

    Attributes:
        family: its entry among the library's defaults.
        tables: its tables of tokens, in the order of their columns.
        patch: latent cells a patch of its transformer has along one side; None: a UNet with cross-attention.
        read: the share of a transformer's double blocks that are read, from and to, both included.
    """

    family: str
    tables: tuple[TokenTable, ...]
    patch: int | None = None
    read: tuple[float, float] = (0.0, 1.0)

    @property
    def joint(self) -> Literal["text-first"] | None:
        """How image and text share a softmax in the host's double blocks."""
        return None if self.patch is None else "text-first"


_CLIP_L, _CLIP_G, _T5 = "clip_l", "clip_g", "t5xxl"
_T5_TABLE = TokenTable("T5", "t5xxl", (_T5,))
_SDXL = Architecture("stable-diffusion-xl", (TokenTable("CLIP", "l", (_CLIP_L,)),))

_KNOWN: Mapping[str, Architecture] = {
    # As in the authors' code, SD 1.x compares among the whole context, padding included.
    "SD15": Architecture(
        "stable-diffusion", (TokenTable("CLIP", "l", (_CLIP_L,), prompt_tokens_only=False),)
    ),
    "SD20": Architecture("stable-diffusion", (TokenTable("CLIP", "h", ("clip_h",)),)),
    "SDXL": _SDXL,
    "SSD1B": _SDXL,
    "Segmind_Vega": _SDXL,
    "KOALA_700M": _SDXL,
    "KOALA_1B": _SDXL,
    # Blocks 5 to 12 of 24: Self-Cross Diffusion Guidance (CVPR 2025).
    "SD3": Architecture(
        "stable-diffusion-3",
        (TokenTable("CLIP", "l", (_CLIP_L, _CLIP_G)), _T5_TABLE),
        patch=2,
        read=(5 / 24, 12 / 24),
    ),
    "Flux": Architecture("flux", (_T5_TABLE,), patch=2),
    "FluxSchnell": Architecture("flux-schnell", (_T5_TABLE,), patch=2),
}
"""By the name of the host's configuration of a model."""


def architecture_of(model: Any) -> Architecture:
    """How a MODEL is nursed.

    Raises:
        ValueError: it can't be, by the name that the host has for it.
    """
    network = model.model
    name = type(network.model_config).__name__
    if name not in _KNOWN:
        raise ValueError(
            f"the host calls this model {name}, and Attend-and-Excite can't read its attention: it nurses "
            "Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, and FLUX.1 dev and schnell"
        )
    if getattr(network, "concat_keys", ()):
        raise ValueError(
            f"this {name} takes a picture or a mask beside the text, as those that fill in or edit do, and "
            "isn't nursed: load the model that draws from text alone"
        )
    return _KNOWN[name]

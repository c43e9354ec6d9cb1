"""What a picture was made with, in the words in which A1111, Forge and gallery programs show it."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from attend_excite.schedulers import sampler_of
from attend_excite.subjects import text_of

if TYPE_CHECKING:
    from attend_excite.metadata import Origin, Settings

KEY = "parameters"
"""The keyword of their text chunk in a PNG."""

_SHOWN_DIGEST = 10
"""Digits of a digest that they show."""


def infotext(origin: Origin) -> str:
    """The prompt, the negative prompt, and a line of names and values.

    Those programs take brackets for weights: in a plain prompt they are marked as brackets, and LoRAs are
    named in it as there. What only attend-excite knows of the picture stands in its own text beside this one.
    """
    settings = origin.settings
    values = {
        "Steps": settings.steps,
        **sampler_of(settings.scheduler),
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": origin.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": Path(settings.model).stem if settings.model.endswith(".safetensors") else settings.model,
        "VAE": settings.vae and Path(settings.vae.path).name,
        "Denoising strength": settings.strength and f"{settings.strength:g}",
        "Lora hashes": _digests(settings, "loras"),
        "TI hashes": _digests(settings, "embeddings"),
        "Method": settings.method.title,
        "Version": f"attend-excite {version('attend-excite')}",
    }
    told = ", ".join(
        f"{name}: {_quoted(str(value))}" for name, value in values.items() if value not in (None, "")
    )
    prompt, negative = settings.prompt, settings.negative_prompt
    if settings.syntax == "plain":
        prompt, negative = _with_brackets_marked(text_of(prompt)), _with_brackets_marked(negative)
    lines = [prompt + _loras(settings)]
    lines += [f"Negative prompt: {negative}"] if negative.strip() else []
    return "\n".join([*lines, told])


def _with_brackets_marked(text: str) -> str:
    return re.sub(r"[\\()\[\]]", r"\\\g<0>", text)


def _loras(settings: Settings) -> str:
    return "".join(f" <lora:{Path(lora.path).stem}:{lora.weight:g}>" for lora in settings.loras)


def _digests(settings: Settings, what: str) -> str:
    return ", ".join(
        f"{Path(each.path).stem}: {each.digest[:_SHOWN_DIGEST]}" for each in getattr(settings, what)
    )


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value

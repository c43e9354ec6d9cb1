"""The nodes, as the host shows them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io
from PIL import Image
from torch import Tensor

from attend_excite.attention.maps import overlay
from attend_excite.guidance.recipes import method_recipes, packaged_recipes, recipe_names

from .architectures import TokenTable
from .nursing import KEY, nursed
from .prompts import Asked, pieces, read

_CATEGORY = "attend-excite"
_SUBJECTS_HELP = (
    "What the picture must show, one a line or separated by commas. Empty: {}. frog=0.7 asks for less of "
    "one, -hat for as little as possible."
)
_BRACKETS_OR_NOUNS = _SUBJECTS_HELP.format("the words in [brackets], or else the nouns")
_NOUNS = _SUBJECTS_HELP.format("the nouns")


class AttendExcite(io.ComfyNode):
    """MODEL -> MODEL under which samplers nurse their latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttendExcite",
            display_name="Attend-and-Excite",
            category=_CATEGORY,
            description=(
                "Nurses the latents while they are sampled, so that the picture shows every subject of the "
                "prompt. Connect the conditioning of the node Subjects, or give the text and its CLIP."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="From the node Subjects; the sampler takes the same."
                ),
                io.Clip.Input("clip", optional=True, tooltip="Where text is given here."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The sampler's positive prompt, to the letter; or empty, with positive.",
                ),
                io.String.Input("subjects", default="", optional=True, tooltip=_NOUNS),
                io.Combo.Input("recipe", options=recipes(), default="recommended", tooltip=_recipes_help()),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How far latents are shifted, times the recipe's step. 0: not at all.",
                ),
                io.Int.Input(
                    "last_step",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="The last step that is nursed. 0: as the recipe says, often half of the run.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For the sampler, with the same positive prompt.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        recipe: str,
        strength: float,
        last_step: int,
        positive: Any = None,
        clip: Any = None,
        text: str = "",
        subjects: str = "",
    ) -> io.NodeOutput:
        asked = _asked(positive, clip, text, subjects)
        return io.NodeOutput(nursed(model, asked, recipe, strength, last_step))


class AttendExciteSubjects(io.ComfyNode):
    """Text -> CONDITIONING that knows its subjects, which are shown in the text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttendExciteSubjects",
            display_name="Subjects",
            category=_CATEGORY,
            description=(
                "Encodes a prompt as CLIP Text Encode does, and finds the subjects that the picture must "
                "show. They are marked in the text below once the node has run."
            ),
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default="a [cat] and a [frog]"),
                io.String.Input("subjects", default="", tooltip=_BRACKETS_OR_NOUNS),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.String.Output(display_name="subjects", tooltip="What was found, one a line."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: Any, text: str, subjects: str) -> io.NodeOutput:
        asked = Asked.of(text, subjects, clip)
        prompt = read(asked, [_any_table(clip)]).prompt
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(asked.text))
        marked = [[states, {**told, KEY: asked}] for states, told in encoded]
        names = "\n".join(group.text for group in prompt.groups)
        return io.NodeOutput(marked, names, ui={"pieces": [pieces(prompt)]})


class AttendExciteMaps(io.ComfyNode):
    """The maps of a nursed MODEL's last run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttendExciteMaps",
            display_name="Attention maps",
            category=_CATEGORY,
            description=(
                "Where each subject was attended to in the run that made these latents: for each picture one "
                "map a subject, as a picture and as a mask, from the map's lowest to its highest."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The MODEL that Attend-and-Excite gave, or what was made of it."
                ),
                io.Latent.Input("samples", tooltip="What the sampler gave, which is waited for."),
                io.Image.Input("image", optional=True, tooltip="The decoded pictures, to lay the maps over."),
            ],
            outputs=[io.Image.Output(display_name="maps"), io.Mask.Output(display_name="masks")],
        )

    @classmethod
    def execute(cls, model: Any, samples: dict[str, Any], image: Tensor | None = None) -> io.NodeOutput:
        kept = model.attachments.get(KEY)
        if kept is None:
            raise ValueError("this MODEL isn't nursed: connect the one that Attend-and-Excite gave")
        if kept.maps is None or kept.samples is None:
            raise ValueError("this MODEL has drawn nothing yet: connect the one that the sampler was given")
        latents, made = samples["samples"], kept.samples
        if (len(made), *made.shape[-2:]) != (len(latents), *latents.shape[-2:]):
            raise ValueError(
                "the last run of this MODEL made other latents: give each sampler a MODEL of its own"
            )
        if made.shape != latents.shape or not torch.equal(made, latents.to(made)):
            logging.warning(
                "Attention maps: these aren't the latents that the last run of this MODEL gave. Unless you "
                "changed them since, the maps are another picture's: give each sampler a MODEL of its own"
            )
        # The host's pictures have eight pixels a latent cell.
        height, width = samples["samples"].shape[-2:] if image is None else image.shape[1:3]
        size = (8 * height, 8 * width) if image is None else (height, width)
        shown, masks = [], []
        for index in range(len(kept.maps.values)):
            for subject in kept.maps:
                heat = kept.maps[subject].heat_map(index, size=size)
                masks.append(heat)
                if image is None:
                    shown.append(heat[..., None].expand(-1, -1, 3))
                else:
                    shown.append(_overlaid(image[index % len(image)], heat))
        return io.NodeOutput(torch.stack(shown), torch.stack(masks))


class AttendExciteExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AttendExcite, AttendExciteSubjects, AttendExciteMaps]


def recipes() -> list[str]:
    """What can be chosen: the model's own advice, the paper's recipes, and the methods that came after. Not
    those that search for a noise, which the sampler has drawn before."""
    known = packaged_recipes()
    return [
        "recommended",
        *(name for name in (*recipe_names(), *method_recipes()) if "search" not in known[name]),
    ]


def _recipes_help() -> str:
    offered = recipes()
    named = "; ".join(f"{name}: {title}" for name, title in method_recipes().items() if name in offered)
    return f"recommended: what suits the architecture; the rest by name. {named}"


def _asked(positive: Any, clip: Any, text: str, subjects: str) -> Asked:
    marks = [told[KEY] for _, told in positive or [] if KEY in told]
    if text.strip():
        if marks:
            raise ValueError("the prompt is given twice, as positive and as text: leave the text empty")
        if clip is None:
            raise ValueError(
                "text is given without a CLIP to read it: connect the one that the prompt is encoded by"
            )
        asked = Asked.of(text, subjects, clip)
        # CLIP Text Encode reads them as words, so that every column behind them would be another's.
        if asked.text != asked.marked:
            raise ValueError(
                "brackets in text given here would be a part of the sampler's prompt: name the subjects in "
                "`subjects`, or encode the prompt with the node Subjects"
            )
        return asked
    if not marks:
        raise ValueError(
            "a conditioning by itself doesn't say its words: encode the prompt with the node Subjects and "
            "connect that as positive, or connect clip and give the text"
        )
    if len({id(mark) for mark in marks}) > 1:
        raise ValueError("positive is made of several prompts with subjects: connect one of them here")
    if subjects.strip():
        raise ValueError("the subjects of positive are named in the node Subjects: write them there")
    return marks[0]


def _any_table(clip: Any) -> TokenTable:
    """A table of tokens to show subjects by: a word is found in each by its characters."""
    for key, encoder in (("l", "clip_l"), ("h", "clip_h"), ("g", "clip_g"), ("t5xxl", "t5xxl")):
        if getattr(clip.cond_stage_model, encoder, None) is not None:
            return TokenTable("text", key, (encoder,))
    raise ValueError(
        "this CLIP is of a kind that Attend-and-Excite doesn't know: it nurses models with CLIP or T5"
    )


def _overlaid(picture: Tensor, heat: Tensor) -> Tensor:
    """A heat map (height, width) over a picture (height, width, 3) of values 0 to 1."""
    levels = picture.clamp(0, 1).mul(255).round().byte().cpu().numpy()
    laid = np.asarray(overlay(Image.fromarray(levels), heat))
    return torch.from_numpy(laid.astype(np.float32) / 255)

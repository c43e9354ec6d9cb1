"""For people who build with diffusers' modular blocks: a block of the denoising loop that nurses.

    from diffusers import StableDiffusionXLAutoBlocks
    from attend_excite.modular import nursed

    pipe = nursed(StableDiffusionXLAutoBlocks()).init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components()
    pipe(prompt="a cat and a frog", subjects=["cat", "frog"], output="images")

Text is encoded, noise made, and latents denoised and decoded by diffusers' own blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from attend_excite.callback import nursed_in_its_loop, parse_unmarked
from attend_excite.generate import traces_of, warn_of_findings
from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Run, Step
from attend_excite.methods.noise import refuse_search
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.models.families import Conditioning, Family, family_class
from attend_excite.models.hindrances import refuse_hindrances
from attend_excite.models.loading import ready, settings_in, unusable
from attend_excite.models.model import Model
from attend_excite.models.reading import warn_of_cut
from attend_excite.schedulers import refuse_correctors
from attend_excite.subjects import Prompt

PIPELINES: Mapping[str, str] = {
    "stable-diffusion-xl": "StableDiffusionXLPipeline",
    "stable-diffusion-3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux2-klein": "Flux2KleinPipeline",
    "qwenimage": "QwenImagePipeline",
    "z-image": "ZImagePipeline",
}
"""By the `model_name` of diffusers' blocks: the pipeline that has the same parts."""

_ATTENTION_OPTIONS = "cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"
# What the denoiser would be told beside the text, and the guidance pass is not.
_BESIDE_THE_TEXT: Mapping[str, str] = {
    "controlnet_cond": "a ControlNet",
    "control_image_latents": "a ControlNet",
    "controlnet_block_samples": "a ControlNet",
    "ip_adapter_embeds": "an IP-Adapter",
    "image_latent_ids": "pictures",
}


def nursed(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """A copy of diffusers' blocks with a `Nurse` at the beginning of every denoising loop in them.

    Args:
        blocks: a whole model's, as `StableDiffusionXLAutoBlocks()`, a part of those, or a loop alone.

    Raises:
        ValueError: there is no loop in them whose latents can be nursed.
    """
    # Some of diffusers' blocks share theirs among all instances.
    blocks = deepcopy(blocks)
    loops, name = _loops(blocks), blocks.model_name
    if not loops or name is None or name not in PIPELINES:
        raise ValueError(
            f"{type(blocks).__name__} has no denoising loop that can be nursed: give the blocks of "
            f"{', '.join(PIPELINES)}"
        )
    for loop in loops:
        loop.sub_blocks.insert("nurse", Nurse(name), 0)
    return blocks


def _loops(blocks: ModularPipelineBlocks) -> list[LoopSequentialPipelineBlocks]:
    if isinstance(blocks, LoopSequentialPipelineBlocks):
        return [blocks]
    return [loop for part in blocks.sub_blocks.values() for loop in _loops(part)]


class Nurse(ModularPipelineBlocks):
    """Attend-and-Excite as a block of diffusers' denoising loop, to be put before all others of the loop.

    The latents that it leaves to the denoiser are those of `generate` with the same method, text and noise.
    Of a word of several tokens the strongest counts at every step, as with
    `AttendAndExcite(word_tokens="max")` there: to find the dominant one takes a run of its own.

    Attributes:
        model_name: that of the blocks around it, one of `PIPELINES`.
    """

    def __init__(self, model_name: str = "stable-diffusion-xl") -> None:
        super().__init__()
        if model_name not in PIPELINES:
            raise ValueError(f"there is no model_name {model_name!r}: choose one of {', '.join(PIPELINES)}")
        self.model_name = model_name

    @property
    def description(self) -> str:
        return (
            "step within the denoising loop that nurses the latents (Attend-and-Excite) before they are "
            "denoised: it shifts them so that attention goes to every subject of the prompt"
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        wanted = ("tokenizer", "scheduler", self._family_class.network_part)
        kinds = self._pipeline_class._get_signature_types()
        return [
            # Where a pipeline takes many schedulers, Euler's, as in diffusers' own blocks.
            ComponentSpec(name, EulerDiscreteScheduler if issubclass(kind, Enum) else kind)
            for name, (kind, *_) in kinds.items()
            if name.startswith(wanted)
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "latents",
                required=True,
                type_hint=Tensor,
                description="The latents to be nursed. Can be generated in prepare_latents step.",
            ),
            InputParam(
                "timesteps",
                required=True,
                type_hint=Tensor,
                description="The timesteps of the run. Can be generated in set_timesteps step.",
            ),
            InputParam(
                "prompt",
                required=True,
                type_hint=str | list[str],
                description="The prompt or prompts that prompt_embeds were made of, to find the subjects in.",
            ),
            InputParam(
                "subjects",
                type_hint=list,
                description=(
                    "Words of the prompt, phrases, token positions or `Subject`s, with several prompts a "
                    "list of such lists. None: the nouns."
                ),
            ),
            InputParam(
                "method",
                type_hint=AttendAndExcite,
                description="`AttendAndExcite(...)` with a recipe or an objective. None: the model's recipe.",
            ),
            InputParam("height", type_hint=int, description="Of the picture in pixels, for packed latents."),
            InputParam("width", type_hint=int, description="Of the picture in pixels, for packed latents."),
            InputParam(
                kwargs_type="denoiser_input_fields",
                description="What the denoiser is conditioned on, where blocks pass that on together.",
            ),
            *(
                InputParam(name, description="What the denoiser is conditioned on, as it was encoded.")
                for name in self._family_class.block_conditioning
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", type_hint=Tensor, description="The nursed latents."),
            OutputParam(
                "trace",
                type_hint=list,
                description="One `attend_excite.trace.Trace` an image: losses, attention and updates.",
            ),
        ]

    @torch.inference_mode(False)  # a caller's would forbid the gradients
    @torch.no_grad()
    def __call__(self, components: Any, block_state: BlockState, i: int, t: Tensor) -> tuple[Any, BlockState]:
        """Nurse one step's latents.

        Raises:
            ValueError: a subject cannot be found, or the pipeline has something that can't be nursed with.
        """
        state: Any = block_state
        if i == 0:
            state.nursing = self._begin(components, state)
        nursing: _Nursing = state.nursing
        run = nursing.run
        began = time.perf_counter()
        state.latents = nursed_in_its_loop(run, nursing.nurse, state.latents, Step(i, t))
        nursing.seconds.append(time.perf_counter() - began)
        if i == len(state.timesteps) - 1:
            state.trace = traces_of(run, [float(each) for each in state.timesteps], nursing.seconds)
            warn_of_findings(state.trace)
        return components, block_state

    def _begin(self, components: Any, state: Any) -> _Nursing:
        """Look at what the loop was given, and make of it a batch as our own loop has them."""
        for name, what in _BESIDE_THE_TEXT.items():
            if getattr(state, name, None) is not None:
                raise ValueError(f"nursing with {what} isn't served: leave out {name}, or the nurse")
        method = state.method or AttendAndExcite()
        if not isinstance(method, AttendAndExcite) or method.base != StableDiffusion():
            raise ValueError(
                "the method must be an AttendAndExcite without a base: it's diffusers' blocks that denoise"
            )
        method = replace(method, word_tokens="max")
        model = self._model(components)
        refuse_search(model, method)
        refuse_hindrances(model.network)
        refuse_correctors(components.scheduler)
        text = _usable(model.family.conditioning_of_blocks(vars(state)))
        options = {name: getattr(state, name, None) for name in _ATTENTION_OPTIONS}
        run = Run(
            model=model,
            prompts=_prompts(model, method, state.prompt, state.subjects, images=len(text)),
            text=text,
            empty_text=None,
            guidance_scale=1.0,
            scheduler=components.scheduler,
            size=_latent_size(model.family, state),
            network_options={name: given for name, given in options.items() if given is not None},
        )
        return _Nursing(run, method.nursing(run, len(state.timesteps)))

    def _model(self, components: Any) -> Model:
        """What the pipeline is made of, as our own loop knows it."""
        kind = self._pipeline_class
        parts, options = kind._get_signature_keys(kind)
        given = {name: _part(components, name) for name in parts}
        given |= {name: components.config[name] for name in options if name in components.config}
        family = self._family_class(kind(**given))
        configs = {family.network_part: family.network.config}
        if reason := family.refusal(configs) or unusable(family.network):
            raise ValueError(f"this {type(components).__name__} can't be nursed: {reason}")
        folder = getattr(components, "_pretrained_model_name_or_path", None) or ""
        return ready(family, type(components).__name__, settings_in(folder) if folder else {})

    @property
    def _pipeline_class(self) -> Any:
        return getattr(diffusers, PIPELINES[self.model_name])

    @property
    def _family_class(self) -> type[Family]:
        return family_class(PIPELINES[self.model_name])


@dataclass(frozen=True)
class _Nursing:
    """One run: its batch, what is done to a step's latents, and how long that took."""

    run: Run
    nurse: Callable[[Tensor, Step], Tensor]
    seconds: list[float] = field(default_factory=list)


def _part(components: Any, name: str) -> Any:
    if name.startswith("text_encoder") and not hasattr(components, name):
        # The text was encoded elsewhere, by an encoder that is there where its tokenizer is.
        name = name.replace("text_encoder", "tokenizer")
    return getattr(components, name, None)


def _usable(text: Conditioning) -> Conditioning:
    """What a caller's inference mode has made can't be kept for a gradient."""
    return replace(text, tensors={name: tensor.clone() for name, tensor in text.tensors.items()})


def _prompts(
    model: Model, method: AttendAndExcite, prompt: Any, subjects: Any, images: int
) -> tuple[Prompt, ...]:
    """The prompt of each image."""
    prompts = parse_unmarked(model, prompt, subjects, method)
    each, rest = divmod(images, len(prompts))
    if rest:
        raise ValueError(f"{len(prompts)} prompts for {images} images: give each prompt as many")
    warn_of_cut(model, [parsed.text for parsed in prompts])
    return tuple(parsed for parsed in prompts for _ in range(each))


def _latent_size(family: Family, state: Any) -> tuple[int, int]:
    """(height, width) of the latents of a loop."""
    if state.latents.ndim == 4:
        return state.latents.shape[-2], state.latents.shape[-1]
    if state.height is None or state.width is None:
        raise ValueError("packed latents don't say how high and wide they are: give height and width")
    cells = family.size_factor // family.pixels_per_cell
    return state.height // family.size_factor * cells, state.width // family.size_factor * cells

"""For people who come from diffusers: its deprecated Attend-and-Excite class, on our loop.

    from attend_excite.diffusers import StableDiffusionAttendAndExcitePipeline

Arguments and output are those of `diffusers.StableDiffusionAttendAndExcitePipeline`, last supported in
diffusers 0.33.1, and for square pictures with DDIM or PNDM so are the pixels.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from types import MappingProxyType
from typing import Any, ClassVar, SupportsIndex

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from attend_excite.attention.places import map_size
from attend_excite.checks import require
from attend_excite.generate import denoise
from attend_excite.guidance.schedule import Recipe
from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Run
from attend_excite.models.families import Family
from attend_excite.models.families.stable_diffusion import StableDiffusion as StableDiffusionFamily
from attend_excite.models.loading import family_of
from attend_excite.models.model import Model, offloaded_afterwards
from attend_excite.subjects import Prompt, TokenGroup

_ATTN_RES = (16, 16)
_THRESHOLDS: Mapping[int, float] = MappingProxyType({0: 0.05, 10: 0.5, 20: 0.8})


class StableDiffusionAttendAndExcitePipeline(StableDiffusionPipeline):
    """Stable Diffusion with Attend-and-Excite, called as diffusers' deprecated class is called.

    It departs from that class where that class is wrong: the attention maps of pictures that aren't square
    are not transposed, the guidance pass scales its input as the scheduler asks and the step is taken on that
    input, schedulers that go back to earlier latents don't lose its shifts, the model is left as it was after
    an exception, sizes without maps of `attn_res` are drawn all the same, and latents that are no numbers
    are no black picture. `get_indices` counts as the text encoder does.
    """

    # Those of the class: without the image encoder that a plain pipeline has for IP-Adapters.
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar = ["safety_checker", "feature_extractor"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        requires_safety_checker: bool = True,
    ) -> None:
        # A plain pipeline would register its image encoder, and change the caller's scheduler.
        super(StableDiffusionPipeline, self).__init__()
        if safety_checker is None and requires_safety_checker:
            logging.get_logger(__name__).warning(
                "there is no safety checker: what the model draws is shown as it is, and its license may ask "
                "for a checker where others see the pictures"
            )
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("the safety_checker needs a feature_extractor: give both, or neither")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.register_to_config(requires_safety_checker=requires_safety_checker)

    def get_indices(self, prompt: str) -> dict[int, str]:
        """The tokens of a prompt by their position, to choose `token_indices` from.

        They are those that the text encoder gets: a learnt word of several vectors is written out, and what
        lies beyond the context is left out.

        Raises:
            ValueError: the prompt is no text.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {prompt!r}: get_indices takes one text at a time")
        written_out = self.maybe_convert_prompt(prompt, self.tokenizer)
        ids = self.tokenizer(written_out, truncation=True).input_ids
        return dict(enumerate(self.tokenizer.convert_ids_to_tokens(ids)))

    @torch.inference_mode(False)  # a caller's would forbid the gradients
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None,
        token_indices: Sequence[int] | Sequence[Sequence[int]],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        max_iter_to_alter: int = 25,
        thresholds: Mapping[int, float] = _THRESHOLDS,
        scale_factor: float = 20,
        attn_res: tuple[int, int] | None = _ATTN_RES,
        clip_skip: int | None = None,
    ) -> Any:
        """Make pictures of one or more prompts.

        Args:
            prompt: what to draw; None where `prompt_embeds` are given.
            token_indices: the token positions to excite, from `get_indices`; one list a prompt. Those of the
                end token and of padding are taken, with a warning.
            height: in pixels; None: the model's own.
            width: likewise.
            num_inference_steps: denoising steps.
            guidance_scale: of classifier-free guidance; 1 or less: none.
            negative_prompt: what the unconditional half sees.
            num_images_per_prompt: pictures of each prompt.
            eta: the share of added noise in DDIM, 0 to 1.
            generator: for the noise, one for all pictures or one each.
            latents: (images, C, H, W) the noise to start from.
            prompt_embeds: (prompts, tokens, width) text embeddings in place of `prompt`.
            negative_prompt_embeds: likewise in place of `negative_prompt`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False: a tuple of images and safety verdicts.
            callback: called with step, timestep and latents.
            callback_steps: on every so many steps.
            cross_attention_kwargs: for the UNet's attention processors.
            max_iter_to_alter: the first so many iterations are altered; below 0: none.
            thresholds: iteration -> the attention demanded there, 0 to 1. Iterations that the run hasn't are
                left out.
            scale_factor: the step size of the first update, 0 or more.
            attn_res: the attention maps that are read are those with so many cells, height times width; None:
                with one for every 32 x 32 pixels. Where a picture of this size has none, at which that class
                fails, the default and None stand for the maps of a quarter of the latents' size.
            clip_skip: text encoder layers to leave out at the end.

        Returns:
            `StableDiffusionPipelineOutput`, or a tuple of what is in it.

        Raises:
            ValueError: an argument is out of its range or they do not fit together, the model is none of
                Stable Diffusion 1.x or 2.x, or what it made is no picture (NaN).
        """
        family = family_of(self)
        assert isinstance(family, StableDiffusionFamily)
        height, width = height or family.default_size[0], width or family.default_size[1]
        _require_whole(
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            callback_steps=callback_steps,
            height=height,
            width=width,
        )
        _require_numbers(guidance_scale=guidance_scale, scale_factor=scale_factor, eta=eta)
        self.check_inputs(
            prompt, height, width, callback_steps, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        texts = [prompt] if isinstance(prompt, str) else prompt
        require(
            texts is None or (len(texts) > 0 and all(isinstance(text, str) for text in texts)),
            "prompt",
            prompt,
            "a text, or a list of them",
        )
        if texts is not None and clip_skip is not None:
            layers = range(self.text_encoder.config.num_hidden_layers + 1)
            require(clip_skip in layers, "clip_skip", clip_skip, f"0 to {layers[-1]}, the encoder's layers")
        size = height // self.vae_scale_factor, width // self.vae_scale_factor
        downsampling = _downsampling(family, size, (height, width), attn_res)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        iterations = len(scheduler.timesteps)
        recipe = _recipe(iterations, max_iter_to_alter, thresholds, scale_factor)

        with offloaded_afterwards(self):
            guided = guidance_scale > 1
            text, empty = self.encode_prompt(
                prompt,
                self._execution_device,
                num_images_per_prompt,
                guided,
                negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                clip_skip=clip_skip,
            )
            indices = _indices(token_indices, len(text) // num_images_per_prompt, last=text.shape[1] - 2)
            if texts is not None:
                self._warn_of_what_is_no_word(texts, indices)
            shape = (len(text), family.latent_channels, *size)
            generator = list(generator) if isinstance(generator, tuple) else generator
            if isinstance(generator, list) and len(generator) != len(text):
                raise ValueError(
                    f"{len(generator)} generators for {len(text)} pictures: give one, or one a picture"
                )
            found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            if latents is not None and found != shape:
                raise ValueError(f"the latents are {found}: these pictures need a tensor of shape {shape}")
            noise = latents
            if noise is None:
                noise = randn_tensor(shape, generator, self._execution_device, text.dtype)
            run = Run(
                model=Model(family, type(self).__name__, recipe, downsampling, family.defaults.steps),
                prompts=tuple(_prompt(each) for each in indices for _ in range(num_images_per_prompt)),
                text=family.conditioning(text),
                empty_text=family.conditioning(empty) if guided and empty is not None else None,
                guidance_scale=guidance_scale,
                scheduler=scheduler,
                size=size,
                network_options={"cross_attention_kwargs": cross_attention_kwargs},
            )

            noise = noise.to(self._execution_device, run.latents_dtype)
            warm_up = iterations - num_inference_steps * scheduler.order
            with self.progress_bar(total=num_inference_steps) as bar:  # type: ignore[call-arg]

                def after_step(index: int, timestep: Tensor, latents: Tensor) -> None:
                    # As there: not in the warm-up of PNDM, nor in the second half of Heun's steps.
                    last = index == iterations - 1
                    if not (last or (index + 1 > warm_up and (index + 1) % scheduler.order == 0)):
                        return
                    bar.update()
                    if callback is not None and index % callback_steps == 0:
                        callback(index // scheduler.order, timestep, latents)

                denoised, _ = denoise(
                    run, AttendAndExcite(recipe), noise, generator, eta=eta, after_step=after_step
                )

            images: Any = denoised.to(text.dtype)
            flagged = None
            if output_type != "latent":
                images, flagged = family.decode(denoised, output_type or "pil")
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _warn_of_what_is_no_word(self, texts: Sequence[str], indices: Sequence[Sequence[int]]) -> None:
        for text, positions in zip(texts, indices, strict=True):
            table = self.get_indices(text)
            beyond = [str(at) for at in positions if at >= len(table) - 1]
            if beyond:
                warnings.warn(
                    f"token_indices has {', '.join(beyond)} for {text!r}, where no word is but the end token "
                    f"or padding: its tokens are {table}",
                    stacklevel=5,  # past the two decorators of __call__
                )


def _recipe(
    iterations: int, max_iter_to_alter: float, thresholds: Mapping[int, float], scale_factor: float
) -> Recipe:
    """The numbers of a call, as fractions of its run."""
    require(scale_factor >= 0, "scale_factor", scale_factor, "0 or more")
    require(
        isinstance(max_iter_to_alter, Real) and not math.isnan(max_iter_to_alter),
        "max_iter_to_alter",
        max_iter_to_alter,
        "a number of iterations",
    )
    numbers = isinstance(thresholds, Mapping) and all(
        isinstance(number, Real) and not math.isnan(number) for pair in thresholds.items() for number in pair
    )
    require(numbers, "thresholds", thresholds, "attention by iteration, like {0: 0.05, 10: 0.5}")
    altered = math.ceil(min(max(max_iter_to_alter, 0), iterations))
    # An attention of less than nothing is always there; one of more than 1 asks for all there is.
    demanded = {at: min(t, 1.0) for at, t in thresholds.items() if at in range(iterations) and t >= 0}
    return replace(
        Recipe.named("official"),
        # Updates of no size are none.
        step_size=float(scale_factor or 1),
        altered=altered / iterations if scale_factor else 0.0,
        thresholds=tuple((at / iterations, t) for at, t in demanded.items()) if scale_factor else (),
        # diffusers never took over the authors' rule for Stable Diffusion 2.x.
        prompt_tokens_only=False,
    )


def _downsampling(
    family: Family, latent: tuple[int, int], pixels: tuple[int, int], attn_res: tuple[int, int] | None
) -> int:
    """Where the class reads the attention: in the layers whose maps have as many cells as `attn_res`."""
    if attn_res is None:
        cells = math.prod(math.ceil(side / 32) for side in pixels)
    else:
        pair = isinstance(attn_res, Sequence) and len(attn_res) == 2
        fine = pair and all(hasattr(side, "__index__") and side > 0 for side in attn_res)
        require(fine, "attn_res", attn_res, "two whole numbers, like (16, 16), or None")
        cells = math.prod(attn_res)
    sizes = {level: map_size(latent, level) for level in family.downsamplings()}
    chosen = next((level for level, size in sizes.items() if math.prod(size) == cells), None)
    picture = "{}x{}".format(*pixels)
    if chosen is None and (attn_res is None or tuple(attn_res) == _ATTN_RES):
        # Nobody chose them, and the class would fail here.
        quarter = family.defaults.attention_downsampling
        chosen = quarter if quarter in sizes else None
    if chosen is None:
        found = ", ".join(f"{size}" for size in sizes.values())
        raise ValueError(
            f"attn_res is {attn_res}: the attention maps of a picture of {picture} pixels (height x width) "
            f"are {found}: choose one of these"
        )
    if min(sizes[chosen]) < 2:
        least = 2 * chosen * family.pixels_per_cell
        raise ValueError(
            f"height and width are {picture}: too small for attention maps, which would be {sizes[chosen]}: "
            f"make both {least} or more"
        )
    return chosen


def _indices(token_indices: Any, prompts: int, last: int) -> list[list[int]]:
    """One list of positions a prompt, each 1 to `last`."""
    try:
        flat = [hasattr(index, "__index__") for index in token_indices]
        given = [token_indices] if all(flat) else token_indices
        lists = [[operator.index(index) for index in indices] for indices in given]
    except TypeError:
        raise ValueError(
            f"token_indices is {token_indices}: give positions, or a list of them a prompt, as whole numbers"
        ) from None
    if len(lists) != prompts:
        raise ValueError(
            f"token_indices has {len(lists)} lists for {prompts} prompts: give one list a prompt"
        )
    for indices in lists:
        if not indices or not all(1 <= index <= last for index in indices):
            raise ValueError(
                f"token_indices has {indices}: give at least one position a prompt, each 1 to {last}"
            )
    return lists


def _prompt(indices: Sequence[int]) -> Prompt:
    return Prompt("", tuple(TokenGroup(str(index), (index,)) for index in indices), tokens=(), spans=())


def _require_whole(**counts: object) -> None:
    for name, value in counts.items():
        require(
            isinstance(value, SupportsIndex) and operator.index(value) > 0,
            name,
            value,
            "a whole number, 1 or more",
        )


def _require_numbers(**numbers: object) -> None:
    for name, value in numbers.items():
        require(isinstance(value, Real) and math.isfinite(value), name, value, "a number")

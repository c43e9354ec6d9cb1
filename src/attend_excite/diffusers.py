"""For people who come from diffusers: its deprecated Attend-and-Excite class, on our loop.

    from attend_excite.diffusers import StableDiffusionAttendAndExcitePipeline

Arguments and output are those of `diffusers.StableDiffusionAttendAndExcitePipeline`, last supported in
diffusers 0.33.1, and for square pictures with DDIM or PNDM so are the pixels.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from attend_excite.generate import denoise
from attend_excite.guidance.schedule import Recipe
from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Run
from attend_excite.models.families.stable_diffusion import StableDiffusion as StableDiffusionFamily
from attend_excite.models.model import Model, offloaded_afterwards
from attend_excite.subjects import Prompt, TokenGroup


class StableDiffusionAttendAndExcitePipeline(StableDiffusionPipeline):
    """Stable Diffusion with Attend-and-Excite, called as diffusers' deprecated class is called.

    It departs from that class where that class is wrong: the attention maps of pictures that aren't square
    are not transposed, the guidance pass scales its input as the scheduler asks and the step is taken on that
    input, schedulers that go back to earlier latents don't lose its shifts, the model is left as it was after
    an exception, and `attn_res` may be left to follow the picture's size.
    """

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
        image_encoder: CLIPVisionModelWithProjection = None,  # type: ignore[assignment]
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )

    def get_indices(self, prompt: str) -> dict[int, str]:
        """The tokens of a prompt by their position, to choose `token_indices` from."""
        ids = self.tokenizer(prompt).input_ids
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
        thresholds: Mapping[int, float] = MappingProxyType({0: 0.05, 10: 0.5, 20: 0.8}),
        scale_factor: float = 20,
        attn_res: tuple[int, int] | None = None,
        clip_skip: int | None = None,
    ) -> Any:
        """Make pictures of one or more prompts.

        Args:
            prompt: what to draw; None where `prompt_embeds` are given.
            token_indices: the token positions to excite, from `get_indices`; one list a prompt.
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
            max_iter_to_alter: the first so many iterations are altered.
            thresholds: iteration -> the attention demanded there, 0 to 1.
            scale_factor: the step size of the first update.
            attn_res: (height, width) of the attention maps; None: a quarter of the latent's.
            clip_skip: text encoder layers to leave out at the end.

        Returns:
            `StableDiffusionPipelineOutput`, or a tuple of what is in it.

        Raises:
            ValueError: an argument is out of its range or they do not fit together.
        """
        own_size: int = self.unet.config["sample_size"] * self.vae_scale_factor
        height, width = height or own_size, width or own_size
        self.check_inputs(
            prompt, height, width, callback_steps, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}: it must be 1 or more")
        guided = guidance_scale > 1
        text: Any
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
        shape = (
            len(text),
            self.unet.config["in_channels"],
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        prompts = _prompts(
            token_indices, len(text) // num_images_per_prompt, num_images_per_prompt, last=text.shape[1] - 2
        )
        if isinstance(generator, list | tuple) and len(generator) != len(text):
            raise ValueError(
                f"{len(generator)} generators for {len(text)} pictures: give one, or one a picture"
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(
                f"the latents have the shape {tuple(latents.shape)}: these pictures need {shape}"
            )
        generator = list(generator) if isinstance(generator, tuple) else generator
        noise = latents
        if noise is None:
            noise = randn_tensor(shape, generator, self._execution_device, text.dtype)

        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        iterations = len(scheduler.timesteps)
        recipe = replace(
            Recipe.named("official"),
            step_size=scale_factor,
            altered=min(max_iter_to_alter / iterations, 1.0),
            thresholds=tuple((at / iterations, t) for at, t in thresholds.items() if at < iterations),
            # diffusers never took over the authors' rule for Stable Diffusion 2.x.
            prompt_tokens_only=False,
        )
        family, size = StableDiffusionFamily(self), (shape[2], shape[3])
        downsampling = 4 if attn_res is None else family.downsampling_for(size, attn_res)
        run = Run(
            model=Model(family, type(self).__name__, recipe, downsampling),
            prompts=prompts,
            text=family.conditioning(text),
            empty_text=family.conditioning(empty) if guided else None,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            size=size,
            network_options={"cross_attention_kwargs": cross_attention_kwargs},
        )

        noise = noise.to(self._execution_device, run.latents_dtype)
        with offloaded_afterwards(self):
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


def _prompts(
    token_indices: Sequence[int] | Sequence[Sequence[int]],
    prompts: int,
    images_per_prompt: int,
    last: int,
) -> tuple[Prompt, ...]:
    flat = [hasattr(index, "__index__") for index in token_indices]
    if any(flat) and not all(flat):
        raise ValueError(f"token_indices is {token_indices}: give positions, or a list of them a prompt")
    given: Any = [token_indices] if all(flat) else token_indices
    lists = [[operator.index(index) for index in indices] for indices in given]
    if len(lists) != prompts:
        raise ValueError(
            f"token_indices has {len(lists)} lists for {prompts} prompts: give one list a prompt"
        )
    for indices in lists:
        if not indices or not all(1 <= index <= last for index in indices):
            raise ValueError(
                f"token_indices has {indices}: give at least one position a prompt, each 1 to {last}"
            )
    parsed = [
        Prompt("", tuple(TokenGroup(str(index), (index,)) for index in indices), tokens=(), spans=())
        for indices in lists
    ]
    return tuple(prompt for prompt in parsed for _ in range(images_per_prompt))

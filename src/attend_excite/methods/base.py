"""What a method is: every system of the paper stands behind these few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.attention.record import record
from attend_excite.attention.texts import attend_to_sets, side_by_side
from attend_excite.guidance.nurse import Visit
from attend_excite.models.model import Model
from attend_excite.subjects import Prompt


@dataclass(frozen=True)
class Step:
    """One iteration of the denoising loop: its index from 0, and the scheduler's timestep."""

    index: int
    timestep: Tensor


Denoise = Callable[[Tensor, Step], tuple[Tensor, Tensor]]
"""(latents (B, C, H, W), step) -> (latents, model output): what a method does at one step.

The latents that come back are those that go into the scheduler's step: a method that shifts them
returns the shifted ones, as a new tensor, any other the ones it was given. The model output is what
the model is trained to predict (noise or velocity), guided however the method guides.
"""


class Method(Protocol):
    """A way to make a picture of a prompt.

    `attach` is entered before the first step of a batch and left after the last, whatever happens: what
    a method puts into the model it takes out there. Each batch has its own, so a method keeps no state.
    """

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        ...

    @property
    def title(self) -> str:
        """The method's name for people."""
        ...

    @property
    def uses_subjects(self) -> bool:
        """Whether it must know the subjects of the prompt."""
        ...

    @property
    def attends_to_prompt(self) -> bool:
        """Whether the model sees the prompt as a whole, so that the attention to its words can be had."""
        ...

    def attach(self, run: Run) -> AbstractContextManager[Denoise]:
        """Prepare a batch and give the function of one step."""
        ...


@dataclass
class Run:
    """One batch on its way through the denoising loop: what a method may use.

    Attributes:
        model: the model.
        prompts: the prompt of each of the B images.
        text: (B, tokens, width) the text embeddings of the prompts. In a `conditioned_on` block what the
            model is conditioned on instead, image by image, for `predict` and the like.
        empty_text: (B, tokens, width) those of the negative prompts; None: no classifier-free guidance.
        guidance_scale: the weight of classifier-free guidance.
        scheduler: the run's own, with its timesteps set.
        negative: the negative prompt; "": none.
        cross_attention_kwargs: handed to the UNet's attention processors.
        map_places: the layers whose maps are wanted; empty: none are.
        maps: (B, height, width, tokens) a step, filled by `predict_guided` where `map_places` is given.
        visits: per step index, what nursing did; filled by the method.
    """

    model: Model
    prompts: tuple[Prompt, ...]
    text: Tensor
    empty_text: Tensor | None
    guidance_scale: float
    scheduler: Any
    negative: str = ""
    cross_attention_kwargs: dict[str, Any] | None = None
    map_places: tuple[Place, ...] = ()
    maps: list[Tensor] = field(default_factory=list)
    visits: dict[int, list[Visit]] = field(default_factory=dict)

    @property
    def latents_dtype(self) -> torch.dtype:
        """float32 or wider, also for a half-precision model: nursing adds small updates to the latents."""
        return torch.promote_types(self.text.dtype, torch.float32)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(n, tokens, width) the text embeddings of n texts."""
        different = list(dict.fromkeys(texts))
        encoded = self.model.pipeline.encode_prompt(
            different, self.model.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return encoded[[different.index(text) for text in texts]]

    @contextmanager
    def conditioned_on(self, keys: Tensor, values: Tensor) -> Iterator[None]:
        """In the block the conditional half of every pass attends to these texts instead of `text`.

        Args:
            keys: (B, sets, tokens, width) the texts that attention takes its keys from; the output of a
                layer is the mean over the sets.
            values: likewise for the values.
        """
        before = self.text, self.empty_text
        sets, width = keys.shape[1], keys.shape[-1]
        with attend_to_sets(self.model.unet, sets, width):
            try:
                self.condition_on(keys, values)
                if self.empty_text is not None:
                    empty = self.empty_text[:, None].expand(-1, sets, -1, -1)
                    self.empty_text = side_by_side(empty, empty)
                yield
            finally:
                self.text, self.empty_text = before

    def condition_on(self, keys: Tensor, values: Tensor) -> None:
        """Go on with other texts of the same shape, in a `conditioned_on` block."""
        self.text = side_by_side(keys, values)

    def input_scale(self, step: Step) -> float:
        """What the latents are multiplied by to become the UNet's input: 1 but for Euler, LMS and their like,
        whose latents are larger."""
        one = torch.ones((), dtype=torch.float64)
        return float(self.scheduler.scale_model_input(one, step.timestep))

    def unet_inputs(self, latents: Tensor, step: Step, text: Tensor) -> dict[str, Any]:
        """The UNet's arguments for latents as the loop holds them (unscaled, float32 or wider)."""
        return {
            "sample": self.scheduler.scale_model_input(latents, step.timestep).to(text.dtype),
            "timestep": step.timestep,
            "encoder_hidden_states": text,
            "cross_attention_kwargs": self.cross_attention_kwargs,
        }

    def predict(self, latents: Tensor, step: Step, text: Tensor) -> Tensor:
        """One pass of the model: (b, C, H, W) latents and (b, tokens, width) text -> its output."""
        output = self.model.unet(**self.unet_inputs(latents, step, text), return_dict=False)[0]
        return output.to(latents.dtype)

    def predict_guided(self, latents: Tensor, step: Step) -> Tensor:
        """Classifier-free guidance in one pass of 2B images, and the maps of its conditional half."""
        with self._keeping_maps():
            if self.empty_text is None:
                return self.predict(latents, step, self.text)
            text = torch.cat([self.empty_text, self.text])
            unconditional, conditional = self.predict(torch.cat([latents] * 2), step, text).chunk(2)
            return unconditional + self.guidance_scale * (conditional - unconditional)

    @contextmanager
    def _keeping_maps(self) -> Iterator[None]:
        if not self.map_places:
            yield
            return
        with record(self.model.unet, self.map_places) as attention:
            yield
        self.maps.append(attention.average()[-len(self.prompts) :].cpu())

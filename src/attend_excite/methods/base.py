"""What a method is: every system of the paper stands behind these few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attend_excite.attention.record import Layout, record
from attend_excite.attention.texts import side_by_side
from attend_excite.attention.weights import weighted_tokens
from attend_excite.guidance.nurse import Visit
from attend_excite.models.families import Conditioning, concatenated
from attend_excite.models.model import Model
from attend_excite.schedulers import scaled_input, vp_scale
from attend_excite.subjects import Prompt, Stream
from attend_excite.trace import ChosenNoise, Nursed
from attend_excite.turns import turn_of


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


@dataclass(frozen=True)
class Start:
    """A picture that a run begins from.

    Attributes:
        latents: (B, C, H, W) of the picture, without noise.
        index: of the first timestep among the scheduler's; 0: the run begins from noise alone.
        cells: (1, 1, H, W) where is drawn; elsewhere the picture stays. None: everywhere.
    """

    latents: Tensor
    index: int
    cells: Tensor | None = None


@dataclass
class Run:
    """One batch on its way through the denoising loop: what a method may use.

    Attributes:
        model: the model.
        prompts: the prompt of each of the B images.
        text: the conditioning of the prompts. In a `conditioned_on` block what the model is conditioned on
            instead, image by image, for `predict` and the like.
        empty_text: that of the negative prompts; None: no classifier-free guidance.
        guidance_scale: the weight of classifier-free guidance.
        scheduler: the run's own, with its timesteps set.
        size: (height, width) of the latents.
        start: the picture that it begins from; None: noise alone.
        negative: the negative prompt; "": none.
        distilled: what a network with distilled guidance is told; None: it has none.
        network_options: further arguments of every pass of the network, as `cross_attention_kwargs`.
        map_downsampling: latent cells per cell of the maps that are wanted; None: none are.
        maps: (B, height, width, tokens) a step, filled by `predict_guided` where maps are wanted; the tokens
            are those of `columns`.
        visits: per step index, what nursing did; filled by the method.
        dominant_token: draws a word alone and says which of the token positions given it attends to most
            (Appendix A.2); None: nobody can ask.
        nursed: what is nursed, and how far; filled by the method.
        noises: how each image's noise was found; empty where that is the seed's own.
    """

    model: Model
    prompts: tuple[Prompt, ...]
    text: Conditioning
    empty_text: Conditioning | None
    guidance_scale: float
    scheduler: Any
    size: tuple[int, int]
    start: Start | None = None
    negative: str = ""
    distilled: float | None = None
    network_options: dict[str, Any] = field(default_factory=dict)
    map_downsampling: int | None = None
    maps: list[Tensor] = field(default_factory=list)
    visits: dict[int, list[Visit]] = field(default_factory=dict)
    nursed: Nursed | None = None
    noises: Sequence[ChosenNoise] = ()
    dominant_token: Callable[[str, tuple[int, ...]], int] | None = None

    @property
    def timesteps(self) -> Tensor:
        """Those that the run goes through: of one that begins from a picture the last of the scheduler's."""
        return self.scheduler.timesteps[0 if self.start is None else self.start.index :]

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The tables of tokens that the model attends to."""
        first, *further = self.model.family.streams()
        if not further:
            # A caller's own embeddings may be longer or shorter than what the tokenizer makes.
            first = replace(first, width=self.text.states.shape[1])
        return first, *further

    @property
    def columns(self) -> tuple[int, ...] | None:
        """Which of the text's tokens the maps have; None: all.

        Where image and text share a softmax, those of the longest prompt alone: padding is attended to, and
        means nothing. Where padding is masked, likewise: nothing is attended to there.
        """
        if self.model.family.joint is None and not self.model.family.padding_masked:
            return None
        used = []
        for at, stream in enumerate(self.streams):
            length = max(len(p.spans if at == 0 else p.further[at - 1][1]) for p in self.prompts)
            used += range(stream.start, stream.start + length)
        return tuple(used)

    def layout(self, downsampling: int) -> Layout:
        """How this batch's attention is read."""
        family = self.model.family
        return Layout(self.size, self.columns, family.joint, downsampling, family.image_multiple)

    @property
    def latents_dtype(self) -> torch.dtype:
        """float32 or wider, also for a half-precision model: nursing adds small updates to the latents."""
        return torch.promote_types(self.text.dtype, torch.float32)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of n texts."""
        different = list(dict.fromkeys(texts))
        with turn_of(*(stream.tokenizer for stream in self.model.family.streams())):
            encoded, _ = self.model.family.encode(different, None, self.distilled, self.size)
        return encoded[[different.index(text) for text in texts]]

    def encode_negative(self, images: int) -> Conditioning:
        """The conditioning of the negative prompt, so many times, also where the run has no guidance."""
        with turn_of(*(stream.tokenizer for stream in self.model.family.streams())):
            _, encoded = self.model.family.encode([""], self.negative, self.distilled, self.size)
        assert encoded is not None
        return encoded[[0] * images]

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
        with self.model.family.attend_to_sets(sets, width):
            try:
                self.condition_on(keys, values)
                if self.empty_text is not None:
                    empty = self.empty_text.states[:, None].expand(-1, sets, -1, -1)
                    self.empty_text = self.empty_text.with_states(side_by_side(empty, empty))
                yield
            finally:
                self.text, self.empty_text = before

    def condition_on(self, keys: Tensor, values: Tensor) -> None:
        """Go on with other texts of the same shape, in a `conditioned_on` block."""
        self.text = self.text.with_states(side_by_side(keys, values))

    @contextmanager
    def weighted_tokens(self, weights: Tensor) -> Iterator[Callable[[Tensor], None]]:
        """In the block the attention that the image pays to the text's tokens is multiplied.

        In every layer, behind the softmax, and in the conditional half of every pass. Gives a function that
        sets other weights.

        Args:
            weights: (B, tokens).
        """
        if self.model.family.sets_refusal is None:
            # softmax(QK) diag(c) V = softmax(QK) (diag(c) V): multiplying columns of the map is multiplying
            # rows of the values, which are linear in the text. So the map is never made.
            plain = self.text.states[:, None]
            with self.conditioned_on(plain, plain * weights[:, None, :, None]):
                yield lambda others: self.condition_on(plain, plain * others[:, None, :, None])
            return
        before = self.text, self.empty_text

        def weigh(others: Tensor) -> None:
            self.text = before[0].with_token_weights(others)

        family = self.model.family
        layout = Layout(self.size, joint=family.joint, image_multiple=family.image_multiple)
        with weighted_tokens(family.network, family.all_places(), layout):
            try:
                weigh(weights)
                if self.empty_text is not None:
                    plain = weights.new_ones(self.empty_text.states.shape[:2])
                    self.empty_text = self.empty_text.with_token_weights(plain)
                yield weigh
            finally:
                self.text, self.empty_text = before

    def vp_scale(self, step: Step) -> float:
        """What brings the latents to variance-preserving scale: see `schedulers.vp_scale`."""
        return vp_scale(self.scheduler, step.timestep)

    def network_inputs(self, latents: Tensor, step: Step, text: Conditioning) -> dict[str, Any]:
        """The network's arguments for latents as the loop holds them (unscaled, float32 or wider)."""
        scaled = scaled_input(self.scheduler, latents, step.timestep)
        inputs = self.model.family.inputs(scaled.to(text.dtype), step.timestep, text)
        return inputs | self.network_options

    def predict(self, latents: Tensor, step: Step, text: Conditioning) -> Tensor:
        """One pass of the model: (b, C, H, W) latents and the conditioning of b images -> its output."""
        raw = self.model.network(**self.network_inputs(latents, step, text), return_dict=False)[0]
        return self.model.family.output(raw, latents).to(latents.dtype)

    def predict_guided(self, latents: Tensor, step: Step) -> Tensor:
        """Classifier-free guidance in one pass of 2B images, and the maps of its conditional half."""
        with self._keeping_maps():
            if self.empty_text is None:
                return self.predict(latents, step, self.text)
            text = concatenated(self.empty_text, self.text)
            unconditional, conditional = self.predict(torch.cat([latents] * 2), step, text).chunk(2)
            return self.model.family.combine(unconditional, conditional, self.guidance_scale)

    @contextmanager
    def _keeping_maps(self) -> Iterator[None]:
        if self.map_downsampling is None:
            yield
            return
        places = self.model.places(self.map_downsampling)
        with record(self.model.network, places, layout=self.layout(self.map_downsampling)) as attention:
            yield
        self.maps.append(attention.average()[-len(self.prompts) :].cpu())

"""What the denoising loop, the recorder and the methods may ask an architecture."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from attend_excite.a1111 import Chunk
from attend_excite.attention.places import Place, map_size
from attend_excite.finite import check_finite
from attend_excite.subjects import Stream


@dataclass(frozen=True)
class Conditioning:
    """What a model is conditioned on: named tensors whose first axis is the image.

    Only the family that made it looks into it, except that `states`, the text embeddings (B, tokens, width)
    that attention is paid to, may be exchanged for others of as many tokens.
    """

    tensors: Mapping[str, Tensor]
    states_name: str = "encoder_hidden_states"

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Conditioning:
        """That of some images: by a slice, or by a tensor or list of their indices."""
        return self._with({name: tensor[rows] for name, tensor in self.tensors.items()})

    @property
    def states(self) -> Tensor:
        return self.tensors[self.states_name]

    @property
    def device(self) -> torch.device:
        return self.states.device

    @property
    def dtype(self) -> torch.dtype:
        return self.states.dtype

    def with_states(self, states: Tensor) -> Conditioning:
        """The same with other text embeddings."""
        return self._with({**self.tensors, self.states_name: states})

    def with_token_weights(self, weights: Tensor) -> Conditioning:
        """The same for a pass in which the image sees the text's tokens by weights (B, tokens): see
        `attention.weights`."""
        # From 1, since texts of several lengths are filled up with noughts.
        return self._with({**self.tensors, "token_weights_above_1": weights - 1})

    def _with(self, tensors: Mapping[str, Tensor]) -> Conditioning:
        return Conditioning(tensors, self.states_name)


def concatenated(*parts: Conditioning) -> Conditioning:
    """One batch of several."""
    first = parts[0]
    joined = {name: torch.cat(_as_long([part.tensors[name] for part in parts])) for name in first.tensors}
    return Conditioning(joined, first.states_name)


def _as_long(tensors: list[Tensor]) -> list[Tensor]:
    """Texts of several lengths filled up with noughts: families that have such mask what is no text."""
    if tensors[0].ndim < 2:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    return [F.pad(each, (0, 0) * (each.ndim - 2) + (0, longest - each.shape[1])) for each in tensors]


@dataclass(frozen=True)
class Defaults:
    """How a family is used where nobody says otherwise: its entry in `data/families.json`.

    Attributes:
        title: for people.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance, or of the guidance that is distilled into the model.
        attention_downsampling: latent cells per cell of the maps along one side, in the objective.
        recipe: as `Recipe.from_dict` takes it.
        fewest_steps: below so many nursing has no step left in which it could do anything.
        sources: where each number is from.
    """

    title: str
    steps: int
    guidance_scale: float
    attention_downsampling: int
    recipe: Mapping[str, Any]
    fewest_steps: int = 4
    sources: Mapping[str, str] = field(default_factory=dict)


@cache
def family_data() -> Mapping[str, Defaults]:
    """The families' defaults by name."""
    text = files("attend_excite").joinpath("data/families.json").read_text(encoding="utf-8")
    return {name: Defaults(**values) for name, values in json.loads(text).items()}


class Family(ABC):
    """An architecture: all that is particular to it, around one of its pipelines.

    Latents are (B, C, height, width) everywhere outside of a family, also where its network takes them
    packed. Nothing of the pipeline is changed.

    Attributes:
        name: its key in `data/families.json`.
        network_part: the name of the denoising network among the pipeline's parts.
        joint: None where image attends to text alone (cross-attention); "image-first" or "text-first" where
            both share one softmax, by their order.
        sets_refusal: what keeps it from taking keys and values from several texts; None: nothing does.
        padding_masked: whether no attention goes to padding, so that its columns are all noughts.
        reads_chunks: whether it has `encode_chunks`.
        learns_words: the names of vectors in files of textual inversion -> the tokenizer and the text encoder
            that learn the word, by their names in the pipeline; none: there is no such way.
        half: the 16-bit numbers that its published weights are for; others may give nothing but NaN.
        image_multiple: of what the network fills up the number of patches to, in one softmax with the text.
        block_conditioning: by which names diffusers' modular blocks know what the network is conditioned on.
        pipeline: diffusers' pipeline.
    """

    name: ClassVar[str]
    network_part: ClassVar[str] = "transformer"
    joint: ClassVar[Literal["image-first", "text-first"] | None] = None
    sets_refusal: ClassVar[str | None] = "doesn't take keys and values from the text alone"
    padding_masked: ClassVar[bool] = False
    half: ClassVar[torch.dtype] = torch.float16
    image_multiple: ClassVar[int] = 1
    block_conditioning: ClassVar[tuple[str, ...]] = ()
    reads_chunks: ClassVar[bool] = False
    learns_words: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline: Any = pipeline

    @classmethod
    def refusal(cls, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Why a model can't be served, in a sentence; None: it can.

        Args:
            configs: by the name of the part, as far as they are known.
        """
        return None

    @property
    def defaults(self) -> Defaults:
        """Its entry in `data/families.json`."""
        return family_data()[self.name]

    @property
    def network(self) -> Any:
        """The denoising network; of one that torch.compile wrapped, what is in the wrapper."""
        network = getattr(self.pipeline, self.network_part)
        return getattr(network, "_orig_mod", network)

    @property
    def distilled_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network, and a step one pass."""
        return False

    @property
    def takes_guidance(self) -> bool:
        """Whether `guidance_scale` changes anything."""
        return True

    def weight_of_guidance(self, scale: float) -> float:
        """w in unconditional + w (conditional - unconditional) for the pipeline's `guidance_scale`."""
        return scale

    @property
    def pixels_per_cell(self) -> int:
        """Pixels of a picture per cell of the latents along one side."""
        return self.pipeline.vae_scale_factor

    @property
    def size_factor(self) -> int:
        """What height and width of a picture are multiples of, in pixels."""
        return self.pixels_per_cell

    @property
    def longest_side(self) -> int | None:
        """The most pixels that a side of a picture may have; None: any number."""
        return None

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that the model was trained on."""
        size = self.network.config["sample_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return height * self.pixels_per_cell, width * self.pixels_per_cell

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.network.config["in_channels"]

    @abstractmethod
    def streams(self) -> tuple[Stream, ...]:
        """The token tables of the text, in the order of their columns; subjects are found in the first."""

    @abstractmethod
    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        """The conditioning of n texts, and of the negative prompt n times.

        Args:
            texts: the prompts.
            negative: the negative prompt; None: no classifier-free guidance, and no second conditioning.
            guidance: what is handed to a network with distilled guidance.
            size: (height, width) of the latents.
        """

    def encode_chunks(
        self, texts: Sequence[Sequence[Chunk]], negative: Sequence[Chunk] | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        """The conditioning of n texts in A1111's syntax, and of the negative prompt n times.

        Args:
            texts: the chunks of each.
            negative: those of the negative prompt; (): it is empty. None: no classifier-free guidance.
            size: (height, width) of the latents.

        Raises:
            ValueError: this architecture doesn't read them.
        """
        self.require_chunks()
        raise NotImplementedError

    def require_chunks(self) -> None:
        """Raises a ValueError where `encode_chunks` can't be had."""
        if not self.reads_chunks:
            raise ValueError(
                f"{self.defaults.title} reads a prompt at once and without weights: A1111's syntax is for "
                "Stable Diffusion 1, 2 and XL"
            )

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        """Prepare a run's own scheduler for so many steps at a latent's (height, width)."""
        scheduler.set_timesteps(steps, device=self.pipeline._execution_device)

    @abstractmethod
    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The network's arguments for one pass.

        Args:
            latents: (b, C, height, width) as the scheduler wants the network to see them, in its dtype.
            timestep: the scheduler's, a scalar.
            conditioning: of the b images.
        """

    def output(self, raw: Any, latents: Tensor) -> Tensor:
        """What the network gave, as the scheduler takes it: (b, C, height, width)."""
        return raw

    def as_the_pipeline_has_them(self, latents: Tensor) -> Tensor:
        """Latents (B, C, height, width) in the shape in which the pipeline takes and gives them."""
        return latents

    def as_its_loop_has_them(self, latents: Tensor) -> Tensor:
        """Latents (B, C, height, width) in the shape that they have within diffusers' denoising loop."""
        return self.as_the_pipeline_has_them(latents)

    def from_its_loop(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """What `as_its_loop_has_them` made of latents of (height, width) `size`, back again."""
        return latents

    def conditioning_of_blocks(self, made: Mapping[str, Any]) -> Conditioning:
        """The conditioning of the prompts as diffusers' modular blocks made it.

        Args:
            made: `block_conditioning` by name.
        """
        raise NotImplementedError

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance."""
        return self.tempered(unconditional + scale * (conditional - unconditional), conditional)

    def tempered(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """What the pipeline makes of a guided output, that it may not go too far from the conditional one."""
        return guided

    @abstractmethod
    def places(self, downsampling: int) -> tuple[Place, ...]:
        """The attention layers that are read, in running order, for maps of 1/`downsampling` of the latent.

        Raises:
            ValueError: no layer can give such maps.
        """

    def all_places(self) -> tuple[Place, ...]:
        """Every attention layer that could be read, in running order."""
        return self.places(self.defaults.attention_downsampling)

    def self_places(self, places: Sequence[Place]) -> tuple[Place, ...]:
        """The layers in which the image attends to itself as finely as it attends to the text in `places`.

        Raises:
            ValueError: there are none, or they aren't known.
        """
        if self.joint is not None:
            return tuple(places)
        raise ValueError(
            f"this method reads the image's attention to itself, and where {self.defaults.title} has that "
            "isn't known here: choose another method"
        )

    def downsamplings(self) -> tuple[int, ...]:
        """The downsamplings at which there are maps, the finest first."""
        (finest,) = {place.downsampling for place in self.places(self.defaults.attention_downsampling)}
        return finest, 2 * finest, 4 * finest

    def downsampling_for(self, size: tuple[int, int], wanted: tuple[int, int]) -> int:
        """The downsampling at which a latent of (height, width) `size` has maps of (height, width) `wanted`.

        Raises:
            ValueError: no maps have this size.
        """
        levels = self.downsamplings()
        for downsampling in levels:
            if map_size(size, downsampling) == tuple(wanted):
                return downsampling
        sizes = ", ".join("{}x{}".format(*map_size(size, level)) for level in levels)
        raise ValueError(
            f"no attention map is {wanted[0]}x{wanted[1]} (height x width): the sizes here are {sizes}"
        )

    def require_sets(self) -> None:
        """Raises a ValueError where `attend_to_sets` can't be had."""
        if self.sets_refusal is not None:
            raise ValueError(
                f"{self.defaults.title} {self.sets_refusal}, which this method needs: "
                "choose Attend-and-Excite, re-weighting, Composable Diffusion or the plain model"
            )

    def attend_to_sets(self, sets: int, width: int) -> AbstractContextManager[None]:
        """See `attention.texts.attend_to_sets`: keys from one text and values from another.

        Raises:
            ValueError: this architecture's keys and values can't be had so.
        """
        self.require_sets()
        raise NotImplementedError

    def unread_tokens(self, ids: Sequence[int]) -> set[int]:
        """Of tokens with these ids those that the text encoder never saw in its training, where that can be
        known."""
        return set()

    def tokens_of_noughts(self, ids: Sequence[int]) -> set[int]:
        """Of tokens with these ids those whose embeddings are noughts in the first text encoder, as they are
        in what was trained on few words."""
        encoder = self.pipeline.text_encoder
        weights = None if encoder is None else encoder.get_input_embeddings().weight
        if weights is None or weights.is_meta:  # offloaded
            return set()
        read = weights[list(ids)].any(dim=1).tolist()
        return {token for token, known in zip(ids, read, strict=True) if not known}

    def textless_modules(self) -> tuple[nn.Module, ...]:
        """The largest parts of the network that never see the text: what `Model.compile` compiles."""
        return ()

    @abstractmethod
    def activation_bytes(self, size: tuple[int, int]) -> int:
        """About how much memory a guidance pass takes for each image of a latent's (height, width)."""

    def decode(self, latents: Tensor, output_type: str = "pil") -> tuple[Any, list[bool] | None]:
        """Denoised latents -> pictures.

        Args:
            latents: (B, C, height, width).
            output_type: "pil", "np" or "pt", as in diffusers.

        Returns:
            The pictures, and a safety checker's verdict on each; None: the model has no checker.

        Raises:
            ValueError: see `pixels`.
        """
        return self.pipeline.image_processor.postprocess(self.pixels(latents), output_type=output_type), None

    def pixels(self, latents: Tensor) -> Tensor:
        """Denoised latents (B, C, height, width) -> what the autoencoder makes of them: (B, 3, H, W), about
        -1 to 1.

        Raises:
            ValueError: it made NaN of them, which would be black pictures.
        """
        scaled = self.unscaled(latents).to(self.pipeline.vae.dtype)
        # One at a time: an image is the same in every batch, and the decoder's memory that of one.
        pixels = torch.cat([self.decoded(latent[None]) for latent in scaled])
        check_finite("in the autoencoder", {"latents given to it": latents, "pixels": pixels})
        return pixels

    def decoded(self, latents: Tensor) -> Tensor:
        """What the autoencoder makes of its latents (b, C, height, width): (b, 3, height, width), -1 to 1."""
        return self.pipeline.vae.decode(latents, return_dict=False)[0]

    def latents_of(self, pixels: Tensor) -> Tensor:
        """What a run without noise would end with for a picture: its latents (1, C, height, width).

        Args:
            pixels: (1, 3, H, W), -1 to 1.

        Raises:
            ValueError: the autoencoder made NaN of them.
        """
        vae = self.pipeline.vae
        found = self.encoded(pixels.to(self.pipeline._execution_device, vae.dtype))
        latents = self.scaled(found.to(torch.promote_types(found.dtype, torch.float32)))
        check_finite("in the autoencoder", {"the picture's latents": latents})
        return latents

    def encoded(self, pixels: Tensor) -> Tensor:
        """The autoencoder's latents (1, C, height, width) of pixels (1, 3, H, W), -1 to 1: the most likely
        ones, where it has a distribution of them."""
        found = self.pipeline.vae.encode(pixels, return_dict=False)[0]
        return found if isinstance(found, Tensor) else found.mode()

    def scaled(self, latents: Tensor) -> Tensor:
        """The inverse of `unscaled`."""
        config = self.pipeline.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder takes them."""
        config = self.pipeline.vae.config
        return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)

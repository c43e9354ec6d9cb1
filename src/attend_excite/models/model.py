"""A model: its family's parts, and what is known about how to nurse it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attend_excite.attention.places import Place
from attend_excite.guidance.schedule import Recipe
from attend_excite.interrupts import to_the_end
from attend_excite.models.families import Family
from attend_excite.models.page_faults import sparing_page_faults

# More than this in one pass is no faster, and shows nothing for longer.
_LARGEST_BATCH = 32
_USUAL_BATCH = 8


@dataclass(frozen=True, eq=False)
class Model:
    """A model, from `load`.

    It makes one generation at a time: threads that share a model, or its UNet, take turns.

    Attributes:
        family: its architecture, around diffusers' pipeline.
        name: the name, folder or Hub id under which `load` found it.
        recipe: the recipe that the model recommends, or else its family.
        attention_downsampling: latent cells per cell of the maps along one side. 4, a quarter of the
            latent's size, gives the paper's 16x16 maps for Stable Diffusion's 64x64 latents.
        steps: denoising steps where nobody says otherwise.
        layers: the attention layers that are read, by their names in the network; None: the family's choice.
        dominant_tokens: found so far: a word alone as it was drawn, its token positions there, and the
            latents' size -> which of them holds most of its attention.
    """

    family: Family
    name: str
    recipe: Recipe
    attention_downsampling: int
    steps: int
    layers: tuple[str, ...] | None = None
    dominant_tokens: dict[tuple[str, tuple[int, ...], tuple[int, int]], int] = field(
        default_factory=dict, repr=False
    )

    @property
    def pipeline(self) -> Any:
        """Diffusers' pipeline: the parts, and what encodes, decodes and moves them; left as it is."""
        return self.family.pipeline

    @property
    def network(self) -> Any:
        """The denoising network."""
        return self.family.network

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoising network."""
        return self.network.dtype

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose token positions subjects are given by."""
        return self.family.streams()[0].tokenizer

    @property
    def device(self) -> torch.device:
        """Where the network runs, also when its weights are offloaded between passes."""
        return self.pipeline._execution_device

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures the model was trained on."""
        return self.family.default_size

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the latents of a picture of so many pixels."""
        return height // self.family.pixels_per_cell, width // self.family.pixels_per_cell

    def places(self, downsampling: int | None = None) -> tuple[Place, ...]:
        """The attention layers that are read, for maps of 1/`downsampling` of the latent's size; None: as
        `attention_downsampling` says.

        Raises:
            ValueError: no layer can give such maps, or `layers` names one that there isn't.
        """
        usual = downsampling in (None, self.attention_downsampling)
        if self.layers is None:
            return self.family.places(downsampling or self.attention_downsampling)
        chosen = tuple(place for place in self.family.all_places() if place.name in self.layers)
        missing = sorted(set(self.layers) - {place.name for place in chosen})
        if missing or len({place.downsampling for place in chosen}) != 1:
            names = ", ".join(place.name for place in self.family.all_places())
            reason = f"'{missing[0]}' is none" if missing else "they are of different sizes"
            raise ValueError(f"the layers to be read must be of one size, and {reason}: choose from {names}")
        if not usual and chosen[0].downsampling != downsampling:
            return self.family.places(downsampling)
        return chosen

    # `generate` needs to know what a model is, so it can be imported only late; editors and type checkers see
    # its options all the same.
    if TYPE_CHECKING:
        from attend_excite.generate import generate
    else:

        def generate(self, prompt, **options):
            """Make pictures of a prompt: see `attend_excite.generate.generate`, which has the options."""
            from attend_excite.generate import generate

            return generate(self, prompt, **options)

    def compile(self, **options: Any) -> None:
        """Compile the network in place, as `torch.nn.Module.compile` does: for many pictures on a GPU.

        Only for networks with parts that never meet the text, as UNets have. What meets the text stays as it
        is: there attention is recorded and texts are exchanged, and the
        guidance pass ends there. All else is compiled, with sizes and batches left open: each part at most
        four times, with and without a gradient, for one image and for several. Pixels may differ in the
        last digits. On a CPU it gained nothing (`docs/performance.md`). Needs torch 2.13 or later.

        Args:
            options: for `torch.compile`, as backend="inductor".

        Raises:
            RuntimeError: torch is too old.
            ValueError: the text is everywhere in this network.
        """
        if "recompile_limit" not in signature(torch.compile).parameters:
            raise RuntimeError(
                f"compiling needs torch 2.13, and this is {torch.__version__}: update it, or do without"
            )
        if not (modules := self.family.textless_modules()):
            raise ValueError(
                f"in {self.family.defaults.title} every part meets the text, so nothing can be compiled "
                "without losing sight of the attention"
            )
        for module in modules:
            # Parts of one class count together against the limit, and each of their widths counts.
            module.compile(**{"dynamic": True, "recompile_limit": 128} | options)
            assert module._compiled_call_impl is not None
            module._compiled_call_impl = _with_open_sizes(module._compiled_call_impl)


def _with_open_sizes(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Sizes that happen to be equal, as a batch of 16 at 16x16, are not taken for the same one.

    `dynamic=True` alone does that, and compiles again once they differ.
    """

    def open_sizes(tensor: Tensor) -> None:
        torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.ndim)))

    def call(*args: Any, **kwargs: Any) -> Any:
        tree_map_only(Tensor, open_sizes, (args, kwargs))
        return compiled(*args, **kwargs)

    return call


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """In the block no parameter asks for a gradient and nothing is in training mode.

    The gradient of nursing goes to the latents alone; parameters that asked for one would keep every
    layer's activations alive. Afterwards everything is as it was.
    """
    # By name: accelerate's offloading puts others in their place during a pass.
    wanted = [
        (child, name)
        for child in module.modules()
        for name, parameter in child.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    training = [child for child in module.modules() if child.training]

    def restore() -> None:
        for child, name in wanted:
            getattr(child, name).requires_grad_(True)
        for child in training:
            child.training = True

    try:
        for child, name in wanted:
            getattr(child, name).requires_grad_(False)
        for child in training:
            child.training = False
        yield
    finally:
        to_the_end(restore)


@contextmanager
def prepared(network: nn.Module) -> Iterator[None]:
    """In the block a network is as the denoising loop holds it: frozen, and as fast as it can be made."""
    with frozen(network), sparing_page_faults(network):
        yield


@contextmanager
def offloaded_afterwards(pipeline: DiffusionPipeline) -> Iterator[None]:
    """After the block, whatever ends it, a pipeline with offloading hooks has nothing on the accelerator."""
    try:
        yield
    finally:
        pipeline.maybe_free_model_hooks()


def fitting_batch_size(model: Model, latent: tuple[int, int]) -> int:
    """How many images of a latent's (height, width) should fit in the free memory, 1 to 32.

    An estimate from the network's width; 8 where the system doesn't say what is free.
    """
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        # What torch holds for later is free for us.
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    elif (memory := Path("/proc/meminfo")).is_file():
        free = int(memory.read_text().split("MemAvailable:")[1].split()[0]) * 1024
    else:
        return _USUAL_BATCH
    return min(max(free // model.family.activation_bytes(latent), 1), _LARGEST_BATCH)

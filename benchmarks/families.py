"""What nursing costs on the large models, by count: no weights, no GPU, no seconds.

`python benchmarks/families.py` builds each network at its own size on fake tensors, counts the operations of
a step and of a guidance pass (which stops behind the last recorded layer) with its way back, and the memory
of what the guidance pass keeps for the way back, with and without gradient checkpointing. Half of the steps
are nursed, and nothing is refined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from attend_excite.attention.record import Layout, record
from attend_excite.models.families import family_class

LATENT = (128, 128)  # 1024 pixels


def _fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _fused_back(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# The counter knows fused attention on GPUs alone.
FUSED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_back,
}


@dataclass(frozen=True)
class Case:
    """A model: its pipeline's class, its network, what the latents look like there, and its other arguments.

    `passes` is how many images a step sends through the network: two with classifier-free guidance.
    """

    name: str
    pipeline: str
    network: Callable[[], nn.Module]
    latents: tuple[int, ...]
    inputs: Callable[[Tensor], dict[str, Any]]
    passes: int
    columns: int | None


def sdxl() -> nn.Module:
    """Stable Diffusion XL's UNet."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),  # pyright: ignore[reportArgumentType]
        attention_head_dim=(5, 10, 20),  # pyright: ignore[reportArgumentType]
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def sd35_medium() -> nn.Module:
    """Stable Diffusion 3.5 medium's transformer."""
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def _of_sdxl(x: Tensor) -> dict[str, Any]:
    rows = len(x)
    added = {"text_embeds": torch.zeros(rows, 1280), "time_ids": torch.zeros(rows, 6)}
    text = torch.zeros(rows, 77, 2048)
    return {"sample": x, "timestep": 500, "encoder_hidden_states": text, "added_cond_kwargs": added}


def _of_sd3(x: Tensor) -> dict[str, Any]:
    rows = len(x)
    text, pooled = torch.zeros(rows, 333, 4096), torch.zeros(rows, 2048)
    return {
        "hidden_states": x,
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }


def _of_flux(x: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": x,
        "timestep": torch.ones(len(x)),
        "guidance": torch.ones(len(x)),
        "encoder_hidden_states": torch.zeros(len(x), 512, 4096),
        "pooled_projections": torch.zeros(len(x), 768),
        "txt_ids": torch.zeros(512, 3),
        "img_ids": torch.zeros(4096, 3),
    }


CASES = (
    Case("SDXL", "StableDiffusionXLPipeline", sdxl, (4, 128, 128), _of_sdxl, 2, None),
    Case("SD 3.5 medium", "StableDiffusion3Pipeline", sd35_medium, (16, 128, 128), _of_sd3, 2, 40),
    Case(
        "FLUX.1 dev",
        "FluxPipeline",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        (4096, 64),
        _of_flux,
        1,
        20,
    ),
)


def kept(run: Callable[[], Tensor], weights: set[int]) -> int:
    """Bytes that a pass keeps for the way back, weights left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            holding.append(storage)
        return tensor

    holding: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def measure(case: Case) -> dict[str, float]:
    """TFLOP of a step, and of a guidance pass there and back; GiB at 16 bits that it keeps."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network: Any = case.network().requires_grad_(False).eval()
        family = family_class(case.pipeline)(SimpleNamespace(**{_part(case): network, "vae_scale_factor": 8}))  # type: ignore[arg-type]
        places = family.places(family.defaults.attention_downsampling)
        columns = None if case.columns is None else range(case.columns)
        layout = Layout(LATENT, columns, family.joint, family.defaults.attention_downsampling)

        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FUSED) as plain:
            network(**case.inputs(torch.zeros(case.passes, *case.latents)))

        def guidance() -> Tensor:
            latents = torch.zeros(1, *case.latents, requires_grad=True)
            with record(network, places, layout=layout, stop_after_last=True) as recording:
                recording.forward(**case.inputs(latents))
            return recording.average().sum()

        weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        memory = {}
        for name, checkpointing in (("kept", False), ("checkpointed", True)):
            if checkpointing:
                network.enable_gradient_checkpointing()
                network.train()  # checkpointing asks for it; there is no dropout
            # Float32 here, 16 bits on a card.
            memory[name] = kept(guidance, weights) / 2 / 2**30
        network.disable_gradient_checkpointing()
        with FlopCounterMode(display=False, custom_mapping=FUSED) as nursed:
            guidance().backward()
        return {
            "step": plain.get_total_flops() / 1e12,
            "guidance": nursed.get_total_flops() / 1e12,
            **memory,
        }


def _part(case: Case) -> str:
    return family_class(case.pipeline).network_part


def main() -> None:
    """Print the table."""
    print("| | plain step | guidance pass, there and back | excited : plain | kept | checkpointed |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        found = measure(case)
        ratio = 1 + found["guidance"] / 2 / found["step"]
        print(
            f"| {case.name} | {found['step']:.1f} TFLOP | {found['guidance']:.1f} TFLOP | {ratio:.2f} | "
            f"{found['kept']:.1f} GiB | {found['checkpointed']:.1f} GiB |"
        )


if __name__ == "__main__":
    main()

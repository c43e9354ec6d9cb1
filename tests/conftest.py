"""Models for the tests: tiny random ones in Stable Diffusion's layout, and the bundled one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import attend_excite
from attend_excite import Model, load

torch.set_num_threads(1)
BUNDLED = Path(attend_excite.__file__).parent / "models" / "stickers"


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer with Stable Diffusion's context of 77 tokens."""
    return CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", model_max_length=77)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """A random SD 1.x of four levels, 128x128 pixels, saved in diffusers layout.

    Its maps at a quarter of the latent's size are 4x4, from one layer on the way down and two on the
    way up.
    """
    torch.manual_seed(0)
    width = 16
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=2,
        cross_attention_dim=width,
        norm_num_groups=4,
    )
    # Random weights attend almost evenly; sharper queries make maps with something to excite.
    for name, parameter in unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            parameter.data.mul_(4)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        sample_size=128,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("tiny")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Model:
    """The tiny model in float64, where rounding cannot hide a difference."""
    return load(tiny_folder, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="session")
def stickers() -> Model:
    """The bundled model."""
    return load("stickers", device="cpu")


@pytest.fixture
def same_model() -> Callable[[Model], Callable[[], None]]:
    """`check = same_model(model)`, then `check()` fails if anything of the model has changed."""

    def watch(model: Model) -> Callable[[], None]:
        before = _snapshot(model)

        def check() -> None:
            after = _snapshot(model)
            assert [key for key in before | after if before.get(key) != after.get(key)] == []

        return check

    return watch


def _snapshot(model: Model) -> dict[str, object]:
    state: dict[str, object] = {
        f"scheduler.{name}": _plain(value) for name, value in vars(model.pipeline.scheduler).items()
    }
    for part in ("unet", "vae", "text_encoder"):
        for name, module in getattr(model.pipeline, part).named_modules(prefix=part):
            hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
            processor = getattr(module, "processor", None)
            state[name] = (module.training, hooks, id(processor), "forward" in vars(module))
        for name, tensor in (
            getattr(model.pipeline, part).state_dict(prefix=f"{part}:", keep_vars=True).items()
        ):
            state[name] = (tensor.requires_grad, tensor.dtype, _plain(tensor))
    return state


def _plain(value: object) -> object:
    return value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else copy.deepcopy(value)

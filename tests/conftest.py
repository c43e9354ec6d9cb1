"""Models for the tests: tiny random ones in Stable Diffusion's layout, and the bundled one."""

from __future__ import annotations

import contextlib
import copy
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import attend_excite
from attend_excite import Model, load
from attend_excite.benchmark import store
from attend_excite.study.create import create_study

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
    for part in (model.family.network_part, "vae", "text_encoder"):
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


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark run of plain squares: two subsets of four prompts, three systems, three seeds."""
    folder = tmp_path_factory.mktemp("run")
    rows = []
    for index, (subset, prompt, system, seed) in enumerate(
        itertools.product(
            ("animals", "objects"), ("one", "two", "three", "four"), ("ours", "plain", "structure"), (3, 5, 8)
        )
    ):
        job = store.name_of(subset, prompt, system, seed)
        image = Image.new("RGB", (64, 64), (index * 3, 255 - index * 3, 128))
        row = {
            "job": job,
            "prompt": f"{prompt} of the {subset}",
            "subset": subset,
            "seed": seed,
            "system": system,
            "model": "squares",
            "image": store.write_image(folder, job, image),
            "nsfw": False,
        }
        rows.append(row)
    store.write_rows(folder, rows)
    return folder


@pytest.fixture(scope="session")
def study_folder(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of six pages: four prompts, one check, one repeat."""
    folder = tmp_path_factory.mktemp("studies") / "study"
    create_study(small_run, folder, prompts_per_subset=2, seeds=2, checks=1, repeats=1, allow_none=True)
    return folder


@pytest.fixture
def serve_study(study_folder: Path, tmp_path: Path) -> Iterator[Callable[[], tuple[str, subprocess.Popen]]]:
    """`address, process = serve_study()` starts the study's server as people do, on one database a test."""
    started = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def serve() -> tuple[str, subprocess.Popen]:
        options = ["--port", str(port), "--database", f"sqlite:///{tmp_path}/votes.sqlite"]
        program = str(Path(sys.executable).with_name("attend-excite"))
        started.append(subprocess.Popen([program, "study", "serve", str(study_folder), *options]))
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/")
                return f"http://127.0.0.1:{port}", started[-1]
            time.sleep(0.1)
        raise TimeoutError("the study's server doesn't answer")

    yield serve
    for process in started:
        process.kill()
        process.wait()

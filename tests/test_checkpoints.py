"""Models in one file: read without the Hub, and named where they are something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from attend_excite import load
from attend_excite.models import checkpoints, load_streams
from attend_excite.models.families import stable_diffusion
from tests import families
from tests.checkpoints import save_checkpoint


def _sd_2() -> Any:
    pipeline = families.stable_diffusion()
    scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type="v_prediction"
    )
    tokenizer = families.clip_tokenizer(pad_token="!")
    parts = pipeline.components | {"scheduler": scheduler, "tokenizer": tokenizer}
    return type(pipeline)(**parts, requires_safety_checker=False)


def _xl() -> Any:
    pipeline: Any = families.stable_diffusion_xl()
    # As in the real ones, the two encoders are told apart by their widths.
    pipeline.text_encoder = CLIPTextModel(families.clip_config(8))
    pipeline.text_encoder_2 = families.clip_encoder(24, 24)
    return pipeline


def _weights(file: Path) -> dict[str, torch.Tensor]:
    """The weights of a file that is to be written again: apart from it."""
    return {name: weight.clone() for name, weight in load_file(file).items()}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path]]:
    """`folder, file = saved(name, pipeline)`: in diffusers layout and as one file, whose configuration is the
    folder's."""

    def save(name: str, pipeline: Any, **more: torch.Tensor) -> tuple[Path, Path]:
        pipeline.save_pretrained(tmp_path / name)
        monkeypatch.setattr(checkpoints, "CONFIGURATIONS", tmp_path)
        return tmp_path / name, save_checkpoint(pipeline, tmp_path / f"{name}.safetensors", **more)

    return save


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("stable-diffusion-1", families.stable_diffusion),
        ("stable-diffusion-2", _sd_2),
        ("stable-diffusion-xl", _xl),
    ],
)
def test_a_checkpoint_draws_what_its_folder_draws(
    name: str, build: Callable[[], Any], saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = saved(name, build())
    # The second Stable Diffusion is known by its text encoder's width, and the tiny one's is another.
    monkeypatch.setattr(stable_diffusion, "_SD2_TEXT_WIDTH", 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'.*' doesn't say what it predicts")
        models = [families.hurried(load(source, device="cpu", dtype="float64")) for source in (folder, file)]
    drawn = [m.generate("a cat and a frog", steps=4, decode=False, progress=False) for m in models]
    assert torch.equal(drawn[0].latents, drawn[1].latents)
    tokens = [load_streams(source)[0].tokenizer("a cat", padding="max_length") for source in (folder, file)]
    assert tokens[0]["input_ids"] == tokens[1]["input_ids"]


def test_what_a_checkpoint_predicts_is_read_or_asked(saved: Any) -> None:
    _, file = saved("stable-diffusion-2", _sd_2())
    with pytest.warns(UserWarning, match="doesn't say what it predicts: it is taken for one of 768 pixels"):
        load(file, device="cpu")
    save_file(_weights(file), file, {"modelspec.prediction_type": "epsilon"})
    assert load(file, device="cpu").pipeline.scheduler.config["prediction_type"] == "epsilon"
    save_file(_weights(file), file, {"modelspec.predict_key": "v"})  # as ComfyUI says it
    assert load(file, device="cpu").pipeline.scheduler.config["prediction_type"] == "v_prediction"
    _, file = saved("stable-diffusion-xl", _xl(), v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
    config = load(file, device="cpu").pipeline.scheduler.config
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"]


def test_a_checkpoint_that_lacks_something_says_what(saved: Any) -> None:
    _, file = saved("stable-diffusion-1", families.stable_diffusion())
    whole, weights = file.read_bytes(), _weights(file)
    file.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"is not whole: of [\d,]+ bytes of weights [\d,]+ are there"):
        load(file, device="cpu")

    def without(beginning: str) -> None:
        save_file({name: value for name, value in weights.items() if not name.startswith(beginning)}, file)

    for some in ("model.diffusion_model.middle_block.1.", "cond_stage_model.transformer.text_model.final"):
        without(some)
        with pytest.raises(ValueError, match=r"cannot be read as a Stable Diffusion 1 .* it lacks weights"):
            load(file, device="cpu")
    without("first_stage_model.")
    with pytest.raises(ValueError, match="a Stable Diffusion 1 checkpoint without its autoencoder"):
        load(file, device="cpu")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(weights | {name: weights[name].repeat(1, 3, 1, 1)[:, :9].contiguous()}, file)
    with pytest.raises(ValueError, match="whose network takes 9 channels and not 4, as those that fill in"):
        load(file, device="cpu")
    for more, message in (
        ("edm_vpred.sigma_max", "is CosXL's checkpoint, whose scheduler isn't in the file"),
        ("model.diffusion_model.label_emb.0.0.weight", "is an unCLIP, whose network is told of a picture"),
    ):
        save_file(weights | {more: torch.zeros(1)}, file)
        with pytest.raises(ValueError, match=message):
            load(file, device="cpu")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "is a LoRA: .*--lora FILE"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "is a LoRA"),
        (["transformer.single_blocks.0.lora_A.weight"], "is a LoRA"),
        (["emb_params"], "is a word learnt by textual inversion: .*--embedding FILE"),
        (["clip_g", "clip_l"], "is a word learnt by textual inversion"),
        (["control_model.zero_convs.0.0.weight"], "is a ControlNet: ControlNets work in ComfyUI"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter: .* work in ComfyUI"),
        (["conditioner.embedders.0.model.ln_final.bias"], "Stable Diffusion XL's refiner"),
        (["model.diffusion_model.joint_blocks.0.x.weight"], "a Stable Diffusion 3 checkpoint"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "a FLUX checkpoint"),
        (["model.diffusion_model.out.2.bias"], "a denoising network without its text encoders"),
        (["decoder.up.0.block.0.norm1.bias", "encoder.conv_in.bias"], r"an autoencoder \(VAE\): .*--vae"),
        (["text_model.final_layer_norm.bias"], "a text encoder"),
        (["something.else"], "of a kind that isn't known here: give a checkpoint of Stable Diffusion 1, 2"),
    ],
)
def test_files_of_weights_say_what_they_are(names: list[str], what: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2) for name in names}, file)
    for reads in (load, load_streams):
        with pytest.raises(ValueError, match=what):
            reads(file)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>Not found</title>", "is a web page, as a download that failed leaves"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        (b"a cat and a frog\n", "is a text file and holds no weights"),
        (b"PK\x03\x04 archive/data.pkl", "is a file of PyTorch's or a zip archive, which may run code"),
        (b"\x99" * 100, "is damaged, or no file in safetensors' format"),
        (b"\x10" + 7 * b"\0" + b'{"a": [1, 2, 3]}', "is damaged"),
        (None, "there is no file"),
    ],
)
def test_files_without_weights_say_what_they_are(content: bytes | None, what: str, tmp_path: Path) -> None:
    file = tmp_path / "dreams.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=what):
        load(file)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("stable-diffusion-1", {"unet": 859.52, "text_encoder": 123.06}),
        ("stable-diffusion-2", {"unet": 865.91, "text_encoder": 340.39}),
        ("stable-diffusion-xl", {"unet": 2567.46, "text_encoder": 123.06, "text_encoder_2": 694.66}),
    ],
)
def test_the_packaged_configurations_are_of_the_published_sizes(
    name: str, millions: dict[str, float]
) -> None:
    folder = checkpoints.CONFIGURATIONS / name
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for part, size in millions.items():
        with torch.device("meta"):
            if part == "unet":
                module = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / part))
            else:
                module = kinds[part](CLIPTextConfig.from_pretrained(folder / part))
        assert sum(weight.numel() for weight in module.parameters()) / 1e6 == pytest.approx(size, abs=0.01)

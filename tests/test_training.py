"""How the bundled models are trained: what can be known without training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from attend_excite.models.catalogue import source_of
from training.export import joint_pipeline
from training.generator import Batch
from training.glyphs import SUBJECTS, GlyphBox, generator_glyphs
from training.joint import (
    SECOND_WIDTH,
    FlowBatch,
    KeepJointMaps,
    Words,
    new_transformer,
    projecting,
    second_encoder,
    taught,
    words_and_rest,
)
from training.scenes import HELD_OUT_PAIRS, draw_scene
from training.vae import widened
from training.words import token_ids


def test_a_widened_autoencoder_computes_the_same_with_copies_that_can_part() -> None:
    """Net2Net: more channels change nothing yet, but equal copies would learn the same for ever."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    narrow = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, mid_block_add_attention=False, **blocks
    )
    wide = widened(narrow, (8, 48))
    images, latents = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        before, after = (vae.encode(images).latent_dist.mean for vae in (narrow, wide))
        assert torch.allclose(before, after, atol=1e-5)
    before, after = (vae.decode(latents).sample for vae in (narrow, wide))
    assert torch.allclose(before, after, atol=1e-5)
    after.square().mean().backward()
    gradient = wide.decoder.mid_block.resnets[0].conv1.weight.grad.unflatten(0, (16, 3))
    assert not torch.allclose(gradient[:, 0], gradient[:, 1])
    with pytest.raises(ValueError, match="no multiples of the network's own"):
        widened(narrow, (8, 40))


def test_a_caption_may_name_what_is_not_there_but_never_the_wrong_word_for_what_is() -> None:
    box = GlyphBox(generator_glyphs())
    scenes = [draw_scene(box, 0, index, truthful=False) for index in range(200)]
    in_vain = 0
    for scene in scenes:
        words = scene.caption.split()
        for subject, at in zip(scene.subjects, scene.words, strict=True):
            assert words[at].startswith(subject[:3])  # "benches"
        named = [word for word in words if word in SUBJECTS]
        assert not any({a, b} in HELD_OUT_PAIRS for a in named for b in named)
        in_vain += len(set(named) - set(scene.subjects))
    assert 10 < in_vain < 50
    for index in range(200):
        scene = draw_scene(box, 0, index)
        assert {word for word in scene.caption.split() if word in SUBJECTS} <= set(scene.subjects)


def test_joint_attention_that_is_kept_is_diffusers_own_and_masks_bar_words() -> None:
    transformer = new_transformer(24)
    for parameter in transformer.parameters():  # untrained, its blocks add nothing
        torch.nn.init.normal_(parameter, std=0.1)
    images, states, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 6, 24), torch.randn(2, 24)
    times = torch.tensor([300.0, 900.0])
    with torch.no_grad():
        empty = torch.zeros(2, 256, 24)
        expected = transformer(images, torch.cat([states, empty], dim=1), pooled, times).sample
        maps: list[torch.Tensor] = []
        transformer.set_attn_processor(KeepJointMaps(maps))
        states = torch.cat([states, empty[:, :1]], dim=1)  # which counts for all of them
        assert torch.allclose(transformer(images, states, pooled, times).sample, expected, atol=1e-5)
        maps.clear()
        allowed = torch.ones(2, 64, 3, dtype=torch.bool)
        allowed[1, :32, 2] = False
        transformer(images, states, pooled, times, joint_attention_kwargs={"allowed": allowed})
    for attention in maps:
        assert (attention[1, :32, 2] == 0).all()
        assert (attention[1, 32:, 2] > 0).all()
        assert (attention[0] > 0).all()
    roles = torch.zeros(2, 4, 3, dtype=torch.uint8)
    roles[:, 1, 2] = 1
    told = words_and_rest(maps[0], roles)
    assert torch.allclose(told.sum(dim=-1), torch.ones(2, 64))
    assert torch.equal(told[..., 2], maps[0][..., 2])


def test_a_teacher_who_knows_the_noise_teaches_the_flow() -> None:
    torch.manual_seed(0)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    sigma = torch.tensor([0.1, 0.6, 0.99])  # the last is noisier than the teacher ever saw
    at = sigma[:, None, None, None]
    scenes = Batch(latents, noise, *[torch.zeros(3, dtype=torch.bool)] * 8)
    batch = FlowBatch(scenes, (1 - at) * latents + at * noise, sigma)

    def unet(
        noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor, cross_attention_kwargs: dict
    ) -> SimpleNamespace:
        kept = scheduler.alphas_cumprod[times][:, None, None, None]
        told = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        assert torch.allclose(noisy[:2], told[:2], atol=0.05)
        beyond = (noisy - kept.sqrt() * latents) / (1 - kept).sqrt()
        return SimpleNamespace(sample=torch.cat([noise[:2], beyond[2:]]))

    unet.dtype = torch.float32
    teacher = SimpleNamespace(unet=unet, scheduler=scheduler)
    assert torch.allclose(taught(batch, teacher, torch.zeros(3), None), noise - latents, atol=1e-4)


def test_words_for_joint_attention_are_the_pipelines_own(tmp_path: Path) -> None:
    stickers = source_of("stickers")
    joint, vae = tmp_path / "joint", AutoencoderKL.from_pretrained(stickers, subfolder="vae")
    text_encoder = CLIPTextModel.from_pretrained(stickers, subfolder="text_encoder", dtype=torch.float32)
    first = projecting(text_encoder)
    words = Words(first, second_encoder(first))
    new_transformer(first.config.hidden_size + SECOND_WIDTH).save_pretrained(joint / "transformer")
    tokenizer = CLIPTokenizer.from_pretrained(stickers, subfolder="tokenizer")
    pipeline = joint_pipeline(joint, stickers, tokenizer, vae).to(torch.float32)
    states, _, pooled, _ = pipeline.encode_prompt(
        "a cat and a frog", None, None, do_classifier_free_guidance=False
    )
    own, own_pooled = words(torch.from_numpy(token_ids(tokenizer, ["a cat and a frog"])))
    # As one column of zeros counts for all of them.
    own = torch.cat([own, own[:, -1:].expand(-1, states.shape[1] - own.shape[1], -1)], dim=1)
    assert torch.allclose(states, own, atol=0.02)  # half precision has been between
    assert torch.allclose(pooled, own_pooled, atol=0.02)

"""How the bundled models are trained: what can be known without training."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from training.glyphs import SUBJECTS, GlyphBox, generator_glyphs
from training.scenes import HELD_OUT_PAIRS, draw_scene
from training.vae import widened


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

"""How the bundled models are trained: what can be known without training."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

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

"""StructureDiffusion and attention re-weighting: layers by hand, and when they are Stable Diffusion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

from attend_excite import AttendAndExcite, Model, Recipe, StableDiffusion, load
from attend_excite.methods import AttentionReweighting, StructureDiffusion
from attend_excite.nouns import find_phrases
from tests.families import FAMILIES, ready

PROMPT = "a red cube and a white sheep"
# A short step keeps a random network from turning the last bit into another picture.
GENTLE = replace(Recipe.named("official"), step_size=2.0, thresholds=((0.0, 0.01),), max_refinements=5)
LAYER = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"


def _run(model: Model, method: Any, prompt: str | list[str] = PROMPT, **options: Any) -> Tensor:
    fixed = {"steps": 3, "decode": False, "progress": False}
    return model.generate(prompt, method=method, **(fixed | options)).latents


def _encode(model: Model, text: str) -> Tensor:
    return model.pipeline.encode_prompt([text], "cpu", 1, False)[0][0]


def _watch_layer(model: Model, method: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """A layer's queries' input and its output, for the (empty, prompt) halves of one step.

    Taken from its neighbours in the block, x -> norm2 -> layer -> + x -> norm3, out of the hooks' reach.
    """
    block = model.network.get_submodule(LAYER.removesuffix(".attn2"))
    assert isinstance(block, BasicTransformerBlock)
    assert block.norm2 is not None
    assert block.norm3 is not None
    entering: list[Tensor] = []
    handles = [
        norm.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        for norm in (block.norm2, block.norm3)
    ]
    _run(model, method, steps=1, **options)
    for handle in handles:
        handle.remove()
    before, after = entering
    return block.norm2(before), after - before


def _attend(
    model: Model, hidden: Tensor, keys: Tensor, values: Tensor, columns: Tensor | None = None
) -> Tensor:
    """The layer written out: each head's softmax(Q K^T / sqrt(d)), its columns multiplied, times V."""
    layer = model.network.get_submodule(LAYER)
    assert isinstance(layer, Attention)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (layer.heads, -1)).movedim(-2, 0)

    assert layer.to_k is not None
    assert layer.to_v is not None
    assert layer.to_out is not None
    q, k, v = heads(layer.to_q(hidden)), heads(layer.to_k(keys)), heads(layer.to_v(values))
    maps = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    if columns is not None:
        maps = maps * columns
    return layer.to_out[0]((maps @ v).movedim(0, -2).flatten(-2))


@pytest.mark.parametrize("align", ["values", "keys-and-values"])
@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        (PROMPT, {"a red cube": slice(1, 4), "a white sheep": slice(5, 8)}),  # <sot> is 0
        ("an apple tree and an apple", {"an apple tree": slice(1, 4), "an apple": slice(5, 7)}),
    ],
)
def test_structure_averages_over_the_phrases(
    tiny: Model, prompt: str, phrases: dict[str, slice], align: Any
) -> None:
    full, empty = _encode(tiny, prompt), _encode(tiny, "")
    texts = [full]
    for phrase, place in phrases.items():
        texts.append(full.clone())
        texts[-1][place] = _encode(tiny, phrase)[1 : 1 + place.stop - place.start]
    queries, output = _watch_layer(tiny, StructureDiffusion(align=align), prompt=prompt)
    keys = texts if align == "keys-and-values" else [full] * 3
    with torch.no_grad():
        outputs = [_attend(tiny, queries[1], k, v) for k, v in zip(keys, texts, strict=True)]
        by_hand = torch.stack(outputs).mean(dim=0)
        torch.testing.assert_close(output[1], by_hand, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(output[0], _attend(tiny, queries[0], empty, empty), rtol=1e-9, atol=1e-9)
        assert (by_hand - _attend(tiny, queries[1], full, full)).norm() > 1e-3 * by_hand.norm()


@pytest.mark.parametrize("align", ["values", "keys-and-values"])
def test_a_phrase_that_is_the_prompt_is_stable_diffusion(tiny: Model, align: Any) -> None:
    whole = _run(tiny, StructureDiffusion([PROMPT], align))
    torch.testing.assert_close(whole, _run(tiny, StableDiffusion()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("align", ["values", "keys-and-values"])
def test_prompts_with_different_numbers_of_phrases_in_one_batch(tiny: Model, align: Any) -> None:
    prompts = ["a lion is running", "a cat, a dog and a frog"]
    together = _run(tiny, StructureDiffusion(align=align), prompts)
    alone = [_run(tiny, StructureDiffusion(align=align), prompt) for prompt in prompts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_nursing_measures_the_conditioning_of_its_base(tiny: Model) -> None:
    """Refinement drops images from the batch; each keeps its own phrases."""
    nursed = AttendAndExcite(GENTLE, base=StructureDiffusion(align="keys-and-values"))
    together = tiny.generate(
        [PROMPT, "a cat, a dog and a frog"],
        method=nursed,
        seeds=[0, 1],
        steps=3,
        decode=False,
        progress=False,
    )
    refinements = {str(trace.refinements) for trace in together.trace}
    assert len(refinements) > 1, "refinement counts should differ"
    for index, (prompt, seed) in enumerate(zip(together.prompts, together.seeds, strict=True)):
        alone = _run(tiny, nursed, prompt.text, seeds=seed)
        torch.testing.assert_close(together.latents[index], alone[0], rtol=1e-8, atol=1e-8)
    whole = AttendAndExcite(GENTLE, base=StructureDiffusion([PROMPT]))
    torch.testing.assert_close(_run(tiny, whole), _run(tiny, AttendAndExcite(GENTLE)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        (PROMPT, ["a red cube", "a white sheep"]),
        ("a frog with a crown", ["a frog", "a crown"]),
        ("two elephants walking by a green wall", ["two elephants", "a green wall"]),
        ("rice with red sauce and three teddy bears", ["rice", "red sauce", "three teddy bears"]),
        ("walking slowly", []),
    ],
)
def test_noun_phrases(text: str, phrases: list[str]) -> None:
    assert find_phrases(text) == phrases


def test_phrases_that_are_not_there_are_refused(tiny: Model) -> None:
    with pytest.raises(
        ValueError, match="the phrase 'a blue sheep' is not in 'a red cube and a white sheep'"
    ):
        _run(tiny, StructureDiffusion(["a red cube", "a blue sheep"]))
    with pytest.raises(ValueError, match="'a red cube' is not in 'a red cube and a white sheep', or not"):
        _run(tiny, StructureDiffusion(["a red cube", "a red cube"]))
    with pytest.raises(ValueError, match=r"no noun phrase found in 'walking slowly': name one"):
        _run(tiny, StructureDiffusion(), "walking slowly")
    with pytest.raises(ValueError, match="align is 'outputs'"):
        StructureDiffusion(align="outputs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="phrases is empty"):
        StructureDiffusion([])


def test_reweighting_multiplies_the_columns_of_the_subjects(tiny: Model) -> None:
    full, empty = _encode(tiny, PROMPT), _encode(tiny, "")
    columns = torch.ones(77, dtype=torch.float64)
    columns[3], columns[7] = 1.5, -1.5
    queries, output = _watch_layer(
        tiny, AttentionReweighting(1.5, share=1), subjects=["red cube", "-white sheep"]
    )
    with torch.no_grad():
        by_hand = _attend(tiny, queries[1], full, full, columns)
        torch.testing.assert_close(output[1], by_hand, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(output[0], _attend(tiny, queries[0], empty, empty), rtol=1e-9, atol=1e-9)


def test_blocks_that_the_caller_compiled_are_reweighted_too() -> None:
    model = load(ready(FAMILIES["flux"]()))
    expected = _run(model, AttentionReweighting(2.0))
    model.network.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(_run(model, AttentionReweighting(2.0)), expected, rtol=0, atol=1e-6)


def test_a_weight_of_one_is_stable_diffusion_to_the_bit(tiny: Model) -> None:
    assert torch.equal(_run(tiny, AttentionReweighting(1.0)), _run(tiny, StableDiffusion()))
    assert torch.equal(_run(tiny, AttentionReweighting(2.0, share=0)), _run(tiny, StableDiffusion()))


def test_reweighting_ends_after_its_share_of_the_steps(tiny: Model) -> None:
    differs: list[bool] = []

    def compare(_: Any, args: tuple[Tensor]) -> None:
        keys, values = args[0].chunk(2, dim=-1)
        differs.append(not torch.equal(keys, values))

    projection = tiny.network.get_submodule(LAYER + ".to_v")
    handle = projection.register_forward_pre_hook(compare)
    _run(tiny, AttentionReweighting(share=0.8), steps=5)
    handle.remove()
    assert differs == [True] * 4 + [False]


def test_any_processor_stays(tiny: Model) -> None:
    fused = _run(tiny, StructureDiffusion(align="keys-and-values"))
    tiny.network.set_attn_processor(AttnProcessor())
    written_out = _run(tiny, StructureDiffusion(align="keys-and-values"))
    torch.testing.assert_close(written_out, fused, rtol=1e-9, atol=1e-9)


def test_fused_projections_are_refused(tiny_folder: Path) -> None:
    model = load(tiny_folder, device="cpu")
    model.network.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        _run(model, StructureDiffusion())


def test_weights_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is 2.5: it must be -2 to 2"):
        AttentionReweighting(2.5)
    with pytest.raises(ValueError, match=r"share is 1.1: it must be a share of the steps"):
        AttentionReweighting(share=1.1)

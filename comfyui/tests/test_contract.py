"""The nodes against what stands for the host: see contract/README.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attend_excite.guidance.objective import (
    SubjectTokens,
    most_neglected,
    subject_attention,
    subject_losses,
    token_probabilities,
)

pytestmark = pytest.mark.usefixtures("contract")

TEXT = "a [lion] and a (red:1.3) [monkey] on a bench"
NOISE = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def host() -> Any:
    from comfyui.tests import tiny_host

    return tiny_host


@pytest.fixture
def nodes() -> Any:
    from comfyui import nodes

    return nodes


@pytest.fixture
def clip(host: Any) -> Any:
    return host.Clip()


@pytest.fixture
def model(host: Any) -> Any:
    return host.model()


@pytest.fixture
def positive(host: Any, nodes: Any, clip: Any) -> Any:
    with host.executing():
        return nodes.AttendExciteSubjects.execute(clip, TEXT, "").args[0]


@pytest.fixture
def draw(host: Any, positive: Any) -> Iterator[Any]:
    """`draw(model)` as the host's sampler does it, inside of inference mode."""
    import comfy.model_management

    def run(model: Any, sampler: Any = None, noise: Tensor = NOISE, **options: Any) -> Tensor:
        with host.executing():
            negative = host.Clip().encode_from_tokens_scheduled(host.Clip().tokenize(""))
            guider = host.Guider(model, options.pop("positive", positive), negative)
            return guider.sample(noise.clone(), sampler or host.sampler(), **options)

    yield run
    comfy.model_management.interrupted = False


def nursed(
    host: Any, nodes: Any, model: Any, positive: Any, recipe: str = "no-refinement", **options: Any
) -> Any:
    told = {"recipe": recipe, "strength": 1.0, "last_step": 0} | options
    with host.executing():
        return nodes.AttendExcite.execute(model, positive=positive, **told).args[0]


def weights_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    network = model.model
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: (each, each.clone()) for name, each in named.items()}


def test_pictures_differ_and_the_model_keeps_its_very_weights(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    before = weights_of(model)
    assert all(each.is_inference() for each, _ in before.values())
    plain = draw(model)
    under = nursed(host, nodes, model, positive)
    first = draw(under)
    assert not torch.allclose(first, plain)
    assert torch.equal(draw(under), first)
    assert torch.equal(draw(model), plain)
    for name, (each, values) in weights_of(model).items():
        assert each is before[name][0]
        assert torch.equal(values, before[name][1])


def test_strength_0_is_the_plain_picture_to_the_bit(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    under = nursed(host, nodes, model, positive, strength=0.0)
    for sampler in (host.sample_euler, host.sample_heun, host.sample_forgetful):
        assert torch.equal(draw(under, host.sampler(sampler)), draw(model, host.sampler(sampler)))


def test_a_step_is_the_papers_in_the_hosts_scale_and_the_sampler_goes_on_from_it(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    """By hand: x = z sqrt(1 + sigma^2), so alpha dL/dz moves x by alpha (1 + sigma^2) dL/dx."""
    sigma = float(host.SIGMAS[0])
    start = (NOISE * sigma).requires_grad_(True)
    maps = by_hand(host, model, start / (1 + sigma**2) ** 0.5, positive[0][0].clone())
    # "a lion and a red monkey on a bench": <sot> is 0.
    subjects = SubjectTokens.stack([[[2], [6]]] * 2, last=[75] * 2)
    attention = subject_attention(token_probabilities(maps, subjects.last, 100.0), subjects, 0.5**0.5)
    most_neglected(subject_losses(attention, subjects)).sum().backward()
    under = nursed(host, nodes, model, positive, last_step=1)
    shift = first_shift(host, under, draw)
    torch.testing.assert_close(shift, -20 * (1 + sigma**2) * start.grad, atol=1e-4, rtol=1e-3)
    assert shift.abs().max() > 0.1
    for sampler in (host.sample_euler, host.sample_heun):
        found = draw(under, host.sampler(sampler))
        expected = draw(model, host.sampler(sampler), noise=NOISE + shift / sigma)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)
        assert (found - draw(model, host.sampler(sampler))).abs().max() > 0.2


def by_hand(host: Any, model: Any, latents: Tensor, context: Tensor) -> Tensor:
    """The maps of the tiny network, without a hook."""
    network = model.model.diffusion_model
    weights = {name: each.clone() for name, each in network.state_dict().items()}

    def linear(name: str, rows: Tensor) -> Tensor:
        by_head = F.linear(rows, weights[f"layers.{name}.weight"], weights[f"layers.{name}.bias"])
        return by_head.unflatten(-1, (host.HEADS, -1)).transpose(1, 2)

    hidden = F.conv2d(latents, weights["input_blocks.0.weight"], weights["input_blocks.0.bias"], stride=4)
    tokens = hidden.flatten(2).transpose(1, 2).tanh()
    own = F.scaled_dot_product_attention(*(linear(f"attn1_{part}", tokens) for part in "qkv"))
    tokens = tokens + own.transpose(1, 2).flatten(2)
    query, key = linear("attn2_q", tokens), linear("attn2_k", context)
    probabilities = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)
    return probabilities.unflatten(1, (4, 4))


def test_samplers_that_call_twice_a_step_are_nursed_once(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    under = nursed(host, nodes, model, positive, last_step=3)
    draw(under, host.sampler(host.sample_heun))
    visits = under.attachments["attend_excite"].visits
    assert {step: len(each) for step, each in visits.items()} == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("sampler", "why"), [("sample_forgetful", "forgets a shift"), ("sample_adaptive", "chooses its steps")]
)
def test_samplers_that_would_lose_the_shift_are_refused_by_name(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any, sampler: str, why: str
) -> None:
    name = sampler.removeprefix("sample_")
    with pytest.raises(ValueError, match=rf"under the sampler {name}, since .*{why}.*choose another"):
        draw(nursed(host, nodes, model, positive), host.sampler(getattr(host, sampler)))


def test_with_a_mask_only_what_lies_in_it_is_moved(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    """The sampler is handed back its own latents, of which the model sees a mixture with the picture."""
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    with host.executing():
        mask = mask.clone()
    plain, found = draw(model, mask=mask), draw(nursed(host, nodes, model, positive), mask=mask)
    assert not torch.allclose(found[..., 8:], plain[..., 8:])
    assert torch.equal(found[..., :8], plain[..., :8])
    shifts = first_shift(host, nursed(host, nodes, model, positive, last_step=1), draw, mask=mask)
    assert shifts[..., 8:].abs().max() > 0
    assert shifts[..., :8].abs().max() == 0


def first_shift(host: Any, model: Any, draw: Any, **options: Any) -> Tensor:
    """What the first step's latents were moved by, seen by the sampler."""
    seen = []

    def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
        before = x.clone()
        model(x, sigmas[0] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": 0})
        seen.append(x - before)
        return x

    draw(model, host.sampler(sample), **options)
    return seen[-1]


def test_an_interrupt_between_passes_leaves_the_model_as_it_was(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    import comfy.model_management as management

    under, before, plain = nursed(host, nodes, model, positive), weights_of(model), draw(model)
    first = draw(under)
    management.interrupted = True
    with pytest.raises(management.InterruptProcessingException):
        draw(under)
    management.interrupted = False
    assert all(each is before[name][0] for name, (each, _) in weights_of(model).items())
    assert torch.equal(draw(model), plain)
    assert torch.equal(draw(under), first)


def test_a_batch_is_nursed_picture_by_picture(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    under = nursed(host, nodes, model, positive, recipe="recommended", last_step=1)
    both, plain = draw(under), draw(model)
    # The first picture is refined without the second.
    visits = under.attachments["attend_excite"].visits[0]
    assert [each.rows.tolist() for each in visits][:2] == [[0, 1], [0]]
    for at in range(2):
        alone = draw(under, noise=NOISE[at : at + 1])[0]
        torch.testing.assert_close(alone, both[at], atol=2e-2, rtol=1e-2)
        assert (alone - plain[at]).abs().max() > 0.2


def test_every_recipe_is_offered_and_moves_latents(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    from attend_excite.guidance.recipes import packaged_recipes

    assert nodes.recipes() == [
        "recommended",
        *(name for name in packaged_recipes() if name != "initno-search"),
    ]
    plain = draw(model)
    for recipe in nodes.recipes():
        under = nursed(host, nodes, model, positive, recipe, last_step=1)
        assert not torch.equal(draw(under), plain), recipe


def test_maps_of_the_last_run_one_a_picture_and_subject(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any
) -> None:
    under = nursed(host, nodes, model, positive, strength=0.0)
    with pytest.raises(ValueError, match="drawn nothing yet"):
        nodes.AttendExciteMaps.execute(under, {"samples": NOISE})
    latents = draw(under)
    with host.executing():
        shown, masks = nodes.AttendExciteMaps.execute(under, {"samples": latents}).args
        laid, _ = nodes.AttendExciteMaps.execute(under, {"samples": latents}, torch.rand(2, 64, 64, 3)).args
    assert shown.shape == (4, 128, 128, 3)
    assert laid.shape == (4, 64, 64, 3)
    assert masks.shape == (4, 128, 128)
    assert masks.amin(dim=(1, 2)).tolist() == [0] * 4
    kept = under.attachments["attend_excite"].maps
    assert list(kept) == ["lion", "monkey"]
    # Of the plain run's first step: the maps of the positive prompt, and not of the negative one.
    begin = NOISE * float(host.SIGMAS[0]) / (1 + float(host.SIGMAS[0]) ** 2) ** 0.5
    expected = by_hand(host, model, begin, positive[0][0].clone())
    torch.testing.assert_close(kept["lion"].values[:, 0], expected[..., 2], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="isn't nursed"):
        nodes.AttendExciteMaps.execute(model, {"samples": latents})


def test_a_long_weighted_prompt_is_found_where_the_host_lays_it_out(host: Any, clip: Any) -> None:
    from comfyui.architectures import TokenTable
    from comfyui.prompts import Asked, read

    table = TokenTable("CLIP", "l", ("clip_l",), prompt_tokens_only=False)
    text = "a (lion:1.3) embedding:vector and " + "very " * 80 + r"old \(grey\) [monkey]"
    reading = read(Asked.of(text, "", clip), [table])
    tokens = [token for chunk in clip.tokenize(Asked.of(text, "", clip).text)["l"] for token, _, _ in chunk]
    (monkey,) = clip.tokenizer.clip_l.tokenizer("monkey")["input_ids"][1:-1]
    (group,) = reading.prompt.groups
    assert [tokens[reading.columns[at]] for at in group.positions] == [monkey]
    assert reading.width == len(tokens) == 2 * 77
    # None of what the host puts between two chunks is among what is compared.
    first, last = reading.prompt.words()
    vector = [at for at, column in enumerate(reading.columns) if not isinstance(tokens[column], int)]
    own = [at for at in range(first, last + 1) if at not in vector]
    assert not {tokens[reading.columns[at]] for at in own} & {tokens[0], tokens[76]}
    (lion,) = read(Asked.of(text, "lion=0.5", clip), [table]).prompt.groups
    assert (lion.text, lion.target) == ("lion", 0.5)


def test_chips_stand_in_the_text(host: Any, nodes: Any, clip: Any) -> None:
    with host.executing():
        shown = nodes.AttendExciteSubjects.execute(clip, "a (red:1.2) lion, a monkey", "")
    assert shown.args[1] == "lion\nmonkey"
    assert shown.ui["pieces"] == [[("a ", None), ("red lion", 0), (", a ", None), ("monkey", 1)]]


def test_errors_say_what_to_connect(
    host: Any, nodes: Any, model: Any, positive: Any, draw: Any, clip: Any
) -> None:
    bare = [[positive[0][0], {}]]
    with pytest.raises(ValueError, match="doesn't say its words"):
        nursed(host, nodes, model, bare)
    with pytest.raises(ValueError, match="given twice"):
        nursed(host, nodes, model, positive, clip=clip, text="a lion")
    with pytest.raises(ValueError, match="without a CLIP"):
        nursed(host, nodes, model, None, text="a lion")
    with pytest.raises(ValueError, match="'tiger' is not in the prompt"):
        nursed(host, nodes, model, None, text="a lion and a monkey", clip=clip, subjects="tiger")
    for text in ("a [lion] and a [monkey]", r"a lion and a \[monkey\]"):
        with pytest.raises(ValueError, match="would be a part of the sampler's prompt: name the subjects"):
            nursed(host, nodes, model, None, text=text, clip=clip, subjects="lion")
    under = nursed(host, nodes, model, None, text="a lion and a monkey", clip=clip)
    with pytest.raises(ValueError, match="nursed already"):
        nursed(host, nodes, under, positive)
    with pytest.raises(ValueError, match="isn't the one"):
        draw(under, positive=bare + bare)
    with pytest.raises(ValueError, match="isn't the one"):
        draw(under, positive=positive)
    with pytest.raises(ValueError, match="part of the picture"):
        draw(under, positive=[[bare[0][0], {"area": (1, 1, 0, 0)}]])
    model.model.model_config = type("LTXV", (), {})()
    with pytest.raises(ValueError, match=r"LTXV.*Stable Diffusion 1\.x"):
        nursed(host, nodes, model, positive)


def listed_nodes() -> list[Any]:
    """As the host asks for them."""
    import comfyui

    return asyncio.run(asyncio.run(comfyui.comfy_entrypoint()).get_node_list())


def test_the_package_declares_its_nodes() -> None:
    names = [each.define_schema().node_id for each in listed_nodes()]
    assert names == ["AttendExcite", "AttendExciteSubjects", "AttendExciteMaps"]


@pytest.mark.parametrize(
    ("example", "form"), [("attend_and_excite", "picture"), ("compare_and_maps", "compare_and_maps")]
)
def test_an_example_says_in_the_page_what_the_server_is_sent(example: str, form: str) -> None:
    """The tests draw the form for programs; the page loads the other."""
    folder = Path(__file__).parent
    sent = json.loads((folder / "workflows" / f"{form}.json").read_text())
    shown = json.loads((folder.parent / "example_workflows" / f"{example}.json").read_text())
    ends = {link: [str(start), slot] for link, start, slot, *_ in shown["links"]}
    known = {each.define_schema().node_id: each.define_schema() for each in listed_nodes()}
    assert {str(node["id"]): node["type"] for node in shown["nodes"]} == {
        number: node["class_type"] for number, node in sent.items()
    }
    for node in shown["nodes"]:
        told = {each["name"]: ends[each["link"]] for each in node["inputs"] if each["link"] is not None}
        wanted = sent[str(node["id"])]["inputs"]
        assert told == {name: value for name, value in wanted.items() if isinstance(value, list)}
        if node["type"] in known:
            names = [each["name"] for each in node["inputs"] if "widget" in each]
            values = dict(zip(names, node.get("widgets_values", []), strict=True))
            assert values == {name: value for name, value in wanted.items() if not isinstance(value, list)}
            assert {each.id for each in known[node["type"]].inputs} >= wanted.keys()

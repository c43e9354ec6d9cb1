"""LoRAs, words of textual inversion and autoencoders that are put into a model, on files of each."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from attend_excite import Model, StableDiffusion, load
from attend_excite.cli import app
from attend_excite.metadata import read_origin
from attend_excite.models import additions, load_streams
from attend_excite.subjects import parse
from tests import families

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="LoRAs need peft")

RANK, ALPHA = 2, 1.0
_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def _lora(path: Path, seed: int, layer: str = _LAYER, width: tuple[int, int] = (8, 16)) -> Path:
    """A random LoRA of one layer, under the names that kohya's trainer gives."""
    generator = torch.Generator().manual_seed(seed)
    name = f"lora_unet_{layer.replace('.', '_')}"
    save_file(
        {
            f"{name}.lora_up.weight": torch.randn(width[0], RANK, generator=generator),
            f"{name}.lora_down.weight": torch.randn(RANK, width[1], generator=generator),
            f"{name}.alpha": torch.tensor(ALPHA),
        },
        path,
    )
    return path


def _change(path: Path) -> torch.Tensor:
    """What a LoRA adds to its layer's weight, by the definition."""
    weights = {name.partition(".")[2]: weight for name, weight in load_file(path).items()}
    return ALPHA / RANK * (weights["lora_up.weight"] @ weights["lora_down.weight"])


def _weight(model: Model) -> torch.Tensor:
    return model.network.get_submodule(_LAYER).weight.detach()


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Model:
    return load(tiny_folder, device="cpu")


@needs_peft
def test_loras_are_added_to_the_weights(tiny_folder: Path, plain: Model, tmp_path: Path) -> None:
    one, two = _lora(tmp_path / "one.safetensors", 1), _lora(tmp_path / "two.safetensors", 2)
    model = load(tiny_folder, device="cpu", loras=[one, (two, -0.5)])
    expected = _weight(plain) + _change(one) - 0.5 * _change(two)
    assert torch.allclose(_weight(model), expected, atol=1e-5)
    # Nothing of peft is left in it.
    assert {type(module) for module in model.network.modules()} == {
        type(module) for module in plain.network.modules()
    }
    assert model.network.state_dict().keys() == plain.network.state_dict().keys()
    drawn = [m.generate("a cat and a frog", steps=4, decode=False, progress=False) for m in (model, plain)]
    assert not torch.allclose(drawn[0].latents, drawn[1].latents, atol=1e-3)
    without = load(tiny_folder, device="cpu", loras=[(one, 0)])
    assert torch.equal(_weight(without), _weight(plain))


@needs_peft
def test_a_lora_of_flux_changes_its_text_encoder_too(tmp_path: Path) -> None:
    families.flux().save_pretrained(tmp_path / "flux")
    plain = load(tmp_path / "flux", device="cpu")
    encoder, layer = plain.pipeline.text_encoder, "text_model.encoder.layers.0.self_attn.q_proj"
    names = {name for name, _ in encoder.named_modules()}
    layer = layer if layer in names else layer.removeprefix("text_model.")
    before = encoder.get_submodule(layer).weight.detach()
    up, down = torch.randn(len(before), RANK), torch.randn(RANK, before.shape[1])
    file = tmp_path / "lora.safetensors"
    of_encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    of_network = "transformer.transformer_blocks.0.attn.to_q"
    wide = plain.network.get_submodule("transformer_blocks.0.attn.to_q").weight.shape
    weights = {f"{of_encoder}.lora_B.weight": up, f"{of_encoder}.lora_A.weight": down}
    weights |= {
        f"{of_network}.lora_B.weight": torch.ones(wide[0], RANK),
        f"{of_network}.lora_A.weight": torch.ones(RANK, wide[1]),
    }
    save_file(weights, file)
    after = load(tmp_path / "flux", device="cpu", loras=[file]).pipeline.text_encoder
    assert torch.allclose(after.get_submodule(layer).weight, before + up @ down, atol=1e-5)


@needs_peft
def test_a_lora_of_something_else_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    strange = _lora(tmp_path / "strange.safetensors", 1, layer="single_blocks.0.linear1")
    with pytest.raises(ValueError, match="made for another architecture"):
        load(tiny_folder, device="cpu", loras=[strange])
    wide = _lora(tmp_path / "wide.safetensors", 1, width=(320, 768))
    with pytest.raises(ValueError, match=r"doesn't fit Stable Diffusion .*, so it was made for another arch"):
        load(tiny_folder, device="cpu", loras=[wide])
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"is an autoencoder \(VAE\), and not a LoRA"):
        load(tiny_folder, device="cpu", loras=[tmp_path / "vae.safetensors"])
    with pytest.raises(ValueError, match=r"the weight 1000 of .* is out of range"):
        load(tiny_folder, device="cpu", loras=[(wide, 1000)])
    pixart = families.pixart_sigma()
    pixart.save_pretrained(tmp_path / "pixart")
    with pytest.raises(ValueError, match="diffusers reads no LoRAs of PixArt"):
        load(tmp_path / "pixart", device="cpu", loras=[wide])
    with pytest.raises(ValueError, match="are for models loaded by name: put them into the pipeline"):
        load(pixart, loras=[wide])


def test_without_peft_a_lora_says_what_to_install(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(additions, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"LoRAs need peft, which isn't installed: pip install 'attend-exc"):
        load(tiny_folder, device="cpu", loras=[_lora(tmp_path / "one.safetensors", 1)])


def test_a_learnt_word_stands_where_it_is_looked_for(tiny_folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 16, generator=generator)
    save_file({"emb_params": vectors}, tmp_path / "BlueStyle.safetensors")
    save_file({"<toy>": vectors[0]}, tmp_path / "anything.safetensors")
    files = [tmp_path / "BlueStyle.safetensors", tmp_path / "anything.safetensors"]
    model = load(tiny_folder, device="cpu", embeddings=files)
    text = "BlueStyle photo of a <toy> and a frog"
    prompt = parse(text, model.family.streams(), ["toy", "frog"])
    # <sot>, three vectors, photo of a, the toy, and a, the frog.
    assert [group.positions for group in prompt.groups] == [(7,), (10,)]
    assert parse(text, load_streams(tiny_folder, embeddings=files), ["toy", "frog"]) == prompt
    ids = [model.tokenizer.convert_tokens_to_ids(f"BlueStyle{end}") for end in ("", "_1", "_2")]
    learnt = model.pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(learnt, vectors)
    # What the text encoder reads is the vectors, one a token, at those places.
    read: list[torch.Tensor] = []
    embedding = model.pipeline.text_encoder.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, __, found: read.append(found))
    model.generate(
        text, subjects=["toy", "frog"], steps=1, method=StableDiffusion(), progress=False, decode=False
    )
    hook.remove()
    assert any(torch.equal(found[0, 1:4], vectors) and torch.equal(found[0, 7], vectors[0]) for found in read)


def test_words_of_stable_diffusion_xl_are_learnt_twice(tmp_path: Path) -> None:
    pipeline: Any = families.stable_diffusion_xl()
    pipeline.save_pretrained(tmp_path / "xl")
    vectors = {"clip_l": torch.ones(2, 16), "clip_g": torch.full((2, 16), 2.0)}
    save_file(vectors, tmp_path / "mystyle.safetensors")
    model = load(tmp_path / "xl", device="cpu", embeddings=[tmp_path / "mystyle.safetensors"])
    (token,) = model.pipeline.tokenizer_2("mystyle", add_special_tokens=False)["input_ids"]
    assert (model.pipeline.text_encoder.get_input_embeddings().weight[token] == 1).all()
    assert (model.pipeline.text_encoder_2.get_input_embeddings().weight[token] == 2).all()


def test_words_that_cannot_be_learnt_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mystyle.safetensors"
    save_file({"emb_params": torch.zeros(1, 768)}, file)
    with pytest.raises(ValueError, match="was learnt on another architecture than Stable Diffusion"):
        load(tiny_folder, device="cpu", embeddings=[file])
    save_file({"emb_params": torch.zeros(1, 16)}, tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match="is called 'cat', which there is already: give the file another"):
        load(tiny_folder, device="cpu", embeddings=[tmp_path / "cat.safetensors"])
    families.sana().save_pretrained(tmp_path / "sana")
    with pytest.raises(ValueError, match="diffusers teaches Sana no words"):
        load(tmp_path / "sana", device="cpu", embeddings=[file])


def test_another_autoencoder_draws_other_pixels_of_the_same_latents(
    tiny_folder: Path, plain: Model, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    families.autoencoder(4, sample_size=128).save_pretrained(tmp_path / "vae")
    model = load(tiny_folder, device="cpu", vae=tmp_path / "vae")
    drawn = [m.generate("a cat", steps=2, method=StableDiffusion(), progress=False) for m in (model, plain)]
    assert torch.equal(drawn[0].latents, drawn[1].latents)
    assert drawn[0].images[0].tobytes() != drawn[1].images[0].tobytes()
    families.autoencoder(16).save_pretrained(tmp_path / "wide")
    families.autoencoder(4, scaling_factor=0.13).save_pretrained(tmp_path / "xl")
    for folder, message in (
        ("wide", "has 16 channels, and the model's own has 4: it is of another architecture"),
        ("xl", "has 0.13 as scaling factor, and the model's own has 0.18215"),
        ("none", "is no VAE in diffusers layout: it has no config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tiny_folder, device="cpu", vae=tmp_path / folder)


def test_additions_are_recorded_and_asked_for_again(tiny_folder: Path, tmp_path: Path) -> None:
    word, moved = tmp_path / "mystyle.safetensors", tmp_path / "moved" / "mystyle.safetensors"
    save_file({"emb_params": torch.ones(2, 16)}, word)
    torch.manual_seed(7)
    families.autoencoder(4, sample_size=128).save_pretrained(tmp_path / "vae")

    def generate(*arguments: str, status: int = 0) -> Any:
        result = CliRunner().invoke(app, ["generate", *arguments, "--out", str(tmp_path / "out"), "--json"])
        assert result.exit_code == status, result.output
        return result

    given = ("--embedding", str(word), "--vae", str(tmp_path / "vae"), "--model", str(tiny_folder))
    said = generate("a mystyle cat and a frog", *given, "--steps", "2", "--recipe", "no-refinement").stdout
    first = json.loads(said)
    assert [subject["positions"] for subject in first["subjects"]] == [[4], [7]]
    file = Path(first["images"][0]["file"])
    settings = read_origin(file).settings
    assert [each.path for each in settings.embeddings] == [str(word)]
    drawn = Image.open(file).tobytes()
    file.unlink()
    again = generate("a mystyle cat and a frog", *given, "--steps", "2", "--recipe", "no-refinement").stdout
    assert Image.open(json.loads(again)["images"][0]["file"]).tobytes() == drawn
    moved.parent.mkdir()
    word.rename(moved)
    refused = generate("--from", str(file), status=2).output
    assert "is not here: say with --embedding where it is" in " ".join(refused.split())
    found = generate("--from", str(file), "--embedding", str(moved)).stdout
    assert Image.open(json.loads(found)["images"][0]["file"]).tobytes() == drawn
    save_file({"emb_params": torch.zeros(2, 16)}, word)
    refused = generate("--from", str(file), status=2).output
    assert "is another than the one that was drawn with: say with --embedding" in " ".join(refused.split())


@needs_peft
def test_a_loras_weight_stands_behind_a_colon(tiny_folder: Path, tmp_path: Path) -> None:
    lora = _lora(tmp_path / "one.safetensors", 1)
    options = ["--model", str(tiny_folder), "--steps", "1", "--method", "stable-diffusion", "--json"]
    options += ["--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["generate", "a cat", *options, "--lora", f"{lora}:0.5"])
    assert result.exit_code == 0, result.output
    (used,) = read_origin(Path(json.loads(result.stdout)["images"][0]["file"])).settings.loras
    assert (used.path, used.weight) == (str(lora), 0.5)

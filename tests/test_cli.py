"""The program as people run it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from attend_excite.cli import app, drawing
from attend_excite.metadata import read_origin
from attend_excite.methods import METHODS, ComposableDiffusion

PROMPT = "a cat and a frog"


def _run(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status, result.output
    return result


def _generate(folder: Path, *arguments: str) -> dict[str, Any]:
    return json.loads(_run("generate", *arguments, "--out", str(folder), "--json").stdout)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two seeds with every extra."""
    folder = tmp_path_factory.mktemp("out")
    options = ("--seeds", "2", "--steps", "2", "--recipe", "no-refinement")
    return _generate(folder, PROMPT, *options, "--compare", "--maps")


def test_every_picture_is_written_and_told(drawn: dict[str, Any]) -> None:
    assert [subject["text"] for subject in drawn["subjects"]] == ["cat", "frog"]
    assert [subject["positions"] for subject in drawn["subjects"]] == [[2], [5]]
    images = drawn["images"]
    assert [(image["method"], image["seed"]) for image in images] == [
        ("stable-diffusion", 0),
        ("stable-diffusion", 1),
        ("attend-excite", 0),
        ("attend-excite", 1),
    ]
    for image in images:
        assert Image.open(image["file"]).size == (128, 128)
        assert Path(image["maps"]).is_file()
        assert Path(image["file"]).name.startswith(f"a-cat-and-a-frog_seed{image['seed']}_{image['method']}")
    assert images[0]["updates"] == 0
    assert images[2]["updates"] > 0
    assert images[2]["attention"].keys() == {"cat", "frog"}
    # Two pictures of 128 pixels, enlarged twice, in two rows.
    width, height = Image.open(drawn["sheet"]).size
    assert 2 * 256 < width < 4 * 256
    assert 2 * 256 < height < 3 * 256


def test_the_token_that_stood_for_a_word_is_told(tmp_path: Path) -> None:
    options = ("--steps", "1", "--recipe", "no-refinement")
    (image,) = _generate(tmp_path, "an elephant with a sombrero", *options)["images"]
    nursed = image["nursed"]["sombrero"]
    assert len(nursed["positions"]) == 1
    assert nursed["tokens"][0] in ("som", "brero</w>", "brero")


@pytest.mark.parametrize("index", [1, 3])
def test_a_picture_is_made_again_to_the_bit(drawn: dict[str, Any], index: int, tmp_path: Path) -> None:
    first = drawn["images"][index]
    again = _generate(tmp_path, "--from", first["file"])
    assert len(again["images"]) == 1
    copy = Path(again["images"][0]["file"])
    assert copy.name == Path(first["file"]).name
    assert copy.read_bytes() == Path(first["file"]).read_bytes()


def test_options_beside_from_override(drawn: dict[str, Any], tmp_path: Path) -> None:
    source = drawn["images"][2]["file"]
    other = _generate(tmp_path, "a cat and a duck", "--from", source, "--seed", "5", "--size", "128x96")
    (image,) = other["images"]
    assert (other["prompt"], image["seed"], image["method"]) == ("a cat and a duck", 5, "attend-excite")
    assert Image.open(image["file"]).size == (128, 96)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_was_begun_from_another_is_made_again(tmp_path: Path) -> None:
    begun, moved = tmp_path / "begun.png", tmp_path / "moved.png"
    Image.linear_gradient("L").resize((96, 128)).convert("RGB").save(begun)
    mask = tmp_path / "mask.png"
    Image.linear_gradient("L").resize((96, 128)).save(mask)
    options = ("--steps", "4", "--recipe", "no-refinement", "--image", str(begun), "--strength", "0.5")
    (first,) = _generate(tmp_path, PROMPT, *options, "--mask", str(mask))["images"]
    assert Image.open(first["file"]).size == (96, 128)
    assert len(first["losses"]) == 1  # half of the two steps that strength 0.5 leaves of four
    (again,) = _generate(tmp_path / "again", "--from", first["file"])["images"]
    assert Image.open(again["file"]).tobytes() == Image.open(first["file"]).tobytes()
    begun.rename(moved)
    refused = _run("generate", "--from", first["file"], status=2)
    assert "begun.png' is not here: say with --image where it is" in " ".join(refused.output.split())
    (again,) = _generate(tmp_path / "moved", "--from", first["file"], "--image", str(moved))["images"]
    assert Image.open(again["file"]).tobytes() == Image.open(first["file"]).tobytes()
    Image.new("RGB", (96, 128)).save(begun)
    refused = _run("generate", "--from", first["file"], status=2)
    assert "is another than the one that was drawn with" in " ".join(refused.output.split())
    said = _run("generate", PROMPT, *options[:-2], "--image", str(moved), "--out", str(tmp_path)).stdout
    assert "strength 0.8, so 3 of 4 steps, nursed in steps 1 to 1 of these" in said


def test_subjects_beside_from_replace_brackets(tmp_path: Path) -> None:
    options = ("--steps", "1", "--recipe", "no-refinement")
    marked = _generate(tmp_path, "a [cat] and a [frog]", *options)
    other = _generate(tmp_path, "--from", marked["images"][0]["file"], "--subject", "frog=0.5")
    assert other["prompt"] == marked["prompt"] == PROMPT
    assert [subject["text"] for subject in other["subjects"]] == ["frog"]


def test_settings_do_not_share_a_file(tmp_path: Path) -> None:
    for guidance in ("1", "0.5", "1"):
        plain = ("--method", "stable-diffusion", "--steps", "1", "--guidance", guidance)
        _generate(tmp_path, PROMPT, *plain)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_table_names_the_file(tmp_path: Path) -> None:
    out = str(tmp_path / "new" / "folder")
    result = _run("generate", PROMPT, "--method", "stable-diffusion", "--steps", "1", "--out", out)
    (file,) = Path(out).iterdir()
    assert str(file) in result.stdout
    assert not result.stderr


def test_the_table_names_the_file_of_the_maps(tmp_path: Path) -> None:
    options = ("--maps", "--method", "stable-diffusion", "--steps", "1", "--out", str(tmp_path))
    result = _run("generate", PROMPT, *options)
    (maps,) = tmp_path.glob("*_maps.png")
    assert str(maps) in result.stdout


@pytest.mark.parametrize(
    ("size", "said"), [("256", "4 times as long"), ("64", "is far from that"), ("160", "")]
)
def test_a_size_far_from_the_models_is_warned_of(size: str, said: str, tmp_path: Path) -> None:
    options = ("--size", size, "--method", "stable-diffusion", "--steps", "1", "--out", str(tmp_path))
    warned = _run("generate", PROMPT, *options).stderr
    assert said in warned
    assert ("was made for 128x128 pixels" in warned) == bool(said)


def test_a_warning_is_said_once(tmp_path: Path) -> None:
    prompt = " and ".join(["a cat", *["a frog"] * 9])
    options = ("--subject", "cat", "--steps", "1", "--recipe", "no-refinement", "--out", str(tmp_path))
    result = _run("generate", prompt, *options)
    assert result.stderr.count("longer than the model's context") == 1
    assert "subjects: cat" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        ([], "give a prompt"),
        (["very beautiful"], "no noun"),
        ([PROMPT, "--subject", "dog"], "'dog' is not in the prompt"),
        ([PROMPT, "--subject", "cat,frog"], 'write --subject "cat" --subject "frog"'),
        (PROMPT.split(), 'put the prompt in quotes: "a cat and a frog"'),
        ([PROMPT, "--subject", "frog=2"], "out of range"),
        ([" and ".join(["a cat"] * 9), "--subject", "cat#9"], "beyond the model's context of 16 tokens"),
        ([PROMPT, "--model", "no/such/model"], "no model 'no/such/model'"),
        ([PROMPT, "--model", "{empty}"], "not a model in diffusers layout"),
        ([PROMPT, "--size", "100"], "a multiple of 8 pixels"),
        ([PROMPT, "--size", "big"], "write it like 512 or 768x512"),
        ([PROMPT, "--model", "no/such/model", "--steps", "0"], "steps is 0"),
        ([PROMPT, "--method", "magic"], "unknown method 'magic'"),
        ([PROMPT, "--recipe", "magic"], "unknown recipe 'magic'"),
        ([PROMPT, "--recipe", "{empty}/none.json"], "cannot be read"),
        ([PROMPT, "--recipe", "{bad_recipe}"], "a threshold is 1.5"),
        ([PROMPT, "--guidance", "1e308"], "the guidance is 1e+308: it must be 0 to 10000"),
        ([PROMPT, "--recipe", "paper", "--method", "stable-diffusion"], "--recipe is for attend-excite"),
        ([PROMPT, "--compare", "--method", "stable-diffusion"], "choose another --method"),
        (["a cat", "--method", "composable"], "cannot be split into concepts"),
        ([PROMPT, "--method", "composable", "--weight", "7"], "2 concepts, and 1 weights"),
        ([PROMPT, "--method", "reweight", "--weight", "3"], "weight is 3.0: it must be -2 to 2"),
        ([PROMPT, "--weight", "1"], "--weight is for composable"),
        ([PROMPT, "--method", "structure", "--phrase", "a dog"], "the phrase 'a dog' is not in"),
        ([PROMPT, "--phrase", "a cat"], "--phrase is for structure"),
        ([PROMPT, "--maps", "--method", "composable"], "never attends to the prompt as a whole"),
        ([PROMPT, "--seeds", "0"], "--seeds is 0"),
        ([PROMPT, "--batch-size", "257"], "--batch-size is 257: it must be 1 to 256"),
        ([PROMPT, "--seeds", "2", "--seed", "5"], "not both"),
        ([PROMPT, "--seed", "-1"], "a seed is out of range"),
        ([PROMPT, "--batch-size", "0"], "--batch-size is 0"),
        ([PROMPT, "--device", "abacus"], "the device 'abacus' is not here"),
        ([PROMPT, "--dtype", "int8"], "unknown dtype 'int8'"),
        ([PROMPT, "--out", "{bad_recipe}/out"], "cannot be written to"),
        (["--from", "{bad_recipe}"], "not a PNG picture"),
        ([PROMPT, "--scheduler", "magic"], "unknown scheduler 'magic': choose one of ddim"),
        ([PROMPT, "--best", "2", "--seeds", "2"], "leave out --seeds and --seed"),
        ([PROMPT, "--best", "0"], "--best is 0"),
        ([PROMPT, "--best-of", "0"], "best_of is 0: it must be 1 to 1000"),
        ([PROMPT, "--best-of", "2", "--method", "composable"], "never shows the model the whole prompt"),
        (["a wombat", "--best", "2"], "nobody can tell which picture is the best"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    bad_recipe, empty = tmp_path / "recipe.json", tmp_path / "empty"
    bad_recipe.write_text('{"base": "official", "thresholds": [[0.2, 1.5]]}')
    empty.mkdir()
    filled = [argument.format(bad_recipe=bad_recipe, empty=empty) for argument in arguments]
    result = _run("generate", "--out", str(empty / "out"), *filled, status=2)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", b"[" * 10**5, "model_index.json cannot be used: it is nested too deep"),
        ("model_index.json", b"5", "model_index.json cannot be used: it holds a number"),
        ("model_index.json", b'{"_class_name": "Nope"}', "Nope is not served"),
        ("unet/config.json", b"\xff", "unet/config.json' is no text in UTF-8, from byte 0 on"),
        ("unet/config.json", b"", "unet/config.json' is not JSON"),
        ("attend_excite.json", b'{"attention_downsampling": "x"}', "attention_downsampling is 'x'"),
        ("attend_excite.json", b'{"layers": 5}', "layers must be a list of names"),
        (
            "attend_excite.json",
            b'{"recipe": {"base": "official", "tuned": {"sygen": {}}}}',
            "unknown recipe 'sygen'",
        ),
        ("tokenizer/tokenizer.json", b"{}", "is not whole: something in it is of the wrong kind"),
        ("tokenizer/tokenizer.json", None, "it has no tokenizer"),
    ],
)
def test_a_damaged_model_is_named(
    tiny_folder: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_bytes(content)
    result = _run("generate", PROMPT, "--model", str(model), "--out", str(tmp_path / "out"), status=2)
    assert message in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is no text in UTF-8"),
        (b"[" * 10**5, "nested too deep"),
        (b'{"step_size": %s}' % (b"9" * 5000), "a number in it is too long"),
        (b"[1, 2]", "it holds a list"),
    ],
)
def test_a_recipe_that_is_none_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "recipe.json").write_bytes(content)
    options = ("--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "out"))
    assert message in _run("generate", PROMPT, *options, status=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", PROMPT, "--out", ""],
        ["explain", ""],
        ["study", "serve", " "],
        ["bench", "--json", ""],
        ["bench", "--chart", ""],
        ["benchmark", "run", "--out", "run", "--prompts", ""],
    ],
)
def test_an_empty_path_is_not_the_current_folder(arguments: list[str]) -> None:
    assert "it is empty" in _run(*arguments, status=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--steps", "9" * 40], "1000 at most"),
        (["bench", "--rounds", "9" * 40], "1000 at most"),
        (["bench", "--only", "["], "'[' is no regular expression"),
        (["bench", "--chart", "chart.gif"], "is no .svg, .png or .pdf"),
        (["bench", "--json", "nowhere/at.json"], "cannot be written: give a file in a folder that is there"),
        (["generate", PROMPT, "--seeds", "9" * 40], "it must be 1 to 1000000"),
        (["generate", PROMPT, "--best", "9" * 40], "it must be 1 to 1000000"),
        (["generate", PROMPT, "--model", "http://x/y"], "no name that a model on the Hub can have"),
        (["tokens", PROMPT, "--model", "a\udcff"], "no name that a model on the Hub can have"),
        (["tokens", PROMPT, "--model", ""], "the model's name is empty"),
        (["generate", PROMPT, "--negative", "a\udcff"], "the negative prompt is no text in UTF-8"),
        (["benchmark", "run", "--out", "run", "--sweep", "sigma=" + "9" * 5000 + ",1"], "sigma is '999"),
        (["benchmark", "prompts", "--out", "nowhere/at/all.csv"], "there is no folder 'nowhere/at'"),
        (["benchmark", "prompts", "--out", "set.txt"], "name the file 'set.csv', not 'set.txt'"),
        (
            ["benchmark", "prompts", "--out", "a.csv", "--set", "two-subjects", "--pairs", "p"],
            "--pairs is for",
        ),
    ],
)
def test_what_no_command_can_mean_is_one_sentence(arguments: list[str], message: str) -> None:
    told = " ".join(_run(*arguments, status=2).stderr.split())
    assert message in told
    assert told.startswith("error: ")


def test_ctrl_c_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_as, left = drawing.draw_as, [1]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return drawn_as(*arguments, **options)

    monkeypatch.setattr(drawing, "draw_as", interrupted)
    line = ("generate", PROMPT, "--method", "stable-diffusion", "--steps", "1", "--seeds", "2")
    line = (*line, "--batch-size", "1", "--out", str(tmp_path / "out"))
    told = " ".join(_run(*line, status=130).stderr.split())
    assert "stopped: 1 picture is finished, and kept in" in told
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert "before a picture was finished: there is none" in _run(*line, status=130).stderr


def test_what_nursing_did_in_vain_is_told(tmp_path: Path) -> None:
    short = tmp_path / "short.json"
    short.write_text('{"base": "recommended", "max_refinements": 3}', encoding="utf-8")
    fast = ("--recipe", str(short), "--steps", "10")
    line = ("generate", "a horse and a dog", "--subject", "a", "--subject", "dog", *fast)
    result = _run(*line, "--json", "--out", str(tmp_path))
    assert "the attention to 'a' could not be raised" in " ".join(result.stderr.split())
    (image,) = json.loads(result.stdout)["images"]
    assert ("stuck", "a") in [(each["kind"], each["subject"]) for each in image["findings"]]
    assert image["findings"][0]["sentence"].startswith("the attention to 'a'")
    assert "stuck: a" in _run(*line, "--out", str(tmp_path)).stdout


def test_the_default_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the README's first command."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", "a cat and a frog", "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".png"]


def test_tokens_shows_what_is_made_of_a_prompt() -> None:
    told = json.loads(_run("tokens", "a grizzly bear and a [hat]", "--json").stdout)
    assert told["tokens"][1] == "a"
    assert told["nouns"] == ["grizzly bear", "hat"]
    assert [subject["text"] for subject in told["subjects"]] == ["hat"]
    shown = _run("tokens", PROMPT, "--subject", "frog=0.7").stdout
    assert "subject frog: frog, position 5, attention wanted 0.7" in shown
    assert "no model" in _run("tokens", PROMPT, "--model", "no/such/model", status=2).stderr


def test_nothing_steers_the_terminal_that_prints_it(tmp_path: Path) -> None:
    steering = "a \x1b7\x07 cat \x9b31m and a \u202efrog"
    told = _run("tokens", steering, "--subject", "cat", "--json").stdout
    assert json.loads(told)["prompt"] == steering
    shown = _run("tokens", steering, "--subject", "cat").stdout
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\x1b[2J quickly\n")
    options = ("--out", str(tmp_path / "run"), "--prompts", str(prompts), "--system", "attend-excite")
    drawn = _run("benchmark", "run", *options, "--seeds", "1", "--steps", "1", status=1)
    assert "\\u001b[2J quickly" in drawn.stderr
    for text in (told, shown, drawn.stderr, drawn.stdout):
        assert not re.search("[\x1b\x07\x9b\u202e]", text)


def test_a_method_s_own_options_are_kept_in_the_picture(tmp_path: Path) -> None:
    options = ["--method", "composable", "--weight", "5", "--weight", "-2"]
    (image,) = _generate(tmp_path, PROMPT, *options, "--steps", "1")["images"]
    method = read_origin(Path(image["file"])).settings.method
    assert method == ComposableDiffusion(weights=(5.0, -2.0))


def test_the_noise_that_was_chosen_is_told_and_drawn_again(tmp_path: Path) -> None:
    fast = ("--steps", "2", "--recipe", "no-refinement", "--best-of", "3")
    (image,) = _generate(tmp_path / "chosen", PROMPT, *fast)["images"]
    losses = image["noise"]["losses"]
    assert image["noise"]["chosen"] == losses.index(min(losses))
    assert len(losses) == 3
    assert read_origin(Path(image["file"])).settings.best_of == 3
    (again,) = _generate(tmp_path / "again", "--from", image["file"])["images"]
    assert Path(again["file"]).read_bytes() == Path(image["file"]).read_bytes()
    (own,) = _generate(tmp_path / "own", "--from", image["file"], "--best-of", "1")["images"]
    assert own["noise"] is None
    told = f"{image['noise']['chosen'] + 1} of 3"
    assert told in _run("generate", PROMPT, *fast, "--out", str(tmp_path)).stdout


def test_the_best_of_some_seeds_is_kept_with_what_it_shows(tmp_path: Path) -> None:
    fast = ("--steps", "5", "--recipe", "no-refinement", "--scheduler", "dpm++")
    every = _generate(tmp_path / "all", PROMPT, "--seeds", "4", *fast)["images"]
    shown = [sum(image["verdict"].values()) for image in every]
    (image,) = _generate(tmp_path / "best", PROMPT, "--best", "4", *fast)["images"]
    assert image["seed"] == shown.index(max(shown))
    origin = read_origin(Path(image["file"]))
    assert (origin.batch, origin.settings.scheduler) == ((0, 1, 2, 3), "dpm++")
    assert Path(image["file"]).read_bytes() == Path(every[image["seed"]]["file"]).read_bytes()
    again = _run("generate", "--from", image["file"], "--out", str(tmp_path / "again"))
    marks = ["✓" if there else "✗" for there in image["verdict"].values()]
    assert f"cat {marks[0]} frog {marks[1]}" in again.stdout
    assert (tmp_path / "again" / Path(image["file"]).name).read_bytes() == Path(image["file"]).read_bytes()


def test_models_lists_the_catalogue() -> None:
    assert "stickers" in _run("models").stdout


def test_words_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from attend_excite.cli import app\n"
        "joint = ['tokens', 'a cat', '--model', 'stickers-joint']\n"
        "for command in (['--help'], ['generate', '--help'], ['models'], ['tokens', 'a cat'], joint):\n"
        "    result = CliRunner().invoke(app, command)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    slow = {'torch', 'diffusers', 'matplotlib', 'scipy'} & sys.modules.keys()\n"
        "    assert not slow, (command, slow)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_help_names_every_method() -> None:
    shown = " ".join(_run("generate", "--help").stdout.split())
    assert all(method in shown for method in METHODS)


def test_the_program_is_installed() -> None:
    program = Path(sys.executable).with_name("attend-excite")
    for started in ([program], [sys.executable, "-m", "attend_excite"]):
        result = subprocess.run([*started, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout == f"attend-excite {version('attend-excite')}\n"

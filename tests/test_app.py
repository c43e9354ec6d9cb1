"""What the page does, without a browser: its functions, its limits, and its API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from attend_excite import Model, Recipe, Subject
from attend_excite.cli import app
from attend_excite.metadata import read_origin, write_png
from attend_excite.methods import AttendAndExcite

pytest.importorskip("gradio", reason="the web page needs gradio")

from attend_excite.app import history, views
from attend_excite.app.actions import Drawn, Progress, Redrawn, Server, compare, draw, draw_again, overlays
from attend_excite.app.forms import Form
from attend_excite.app.jobs import reports
from attend_excite.app.limits import MAX_PROMPT
from attend_excite.app.models import Models
from attend_excite.app.words import subjects_of, words_document, words_from, words_of

_CATS = ["cat", *(f"cat#{number}" for number in range(2, 18))]
FORM = Form("a cat and a frog", recipe="no-refinement", steps=4)


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(Models([str(tiny_folder)]), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def drawn(server: Server) -> Drawn:
    *steps, last = _run(partial(draw, server, replace(FORM, pictures=2)))
    assert [step.done for step in steps] == list(range(1, 9))
    assert all(isinstance(step, Progress) and step.total == 8 for step in steps)
    assert [image.size for image in steps[-1].pictures["Attend-and-Excite"]] == [(128, 128)] * 2
    assert isinstance(last, Drawn)
    return last


def _run(work: Callable[..., None]) -> list[Any]:
    async def collect() -> list[Any]:
        return [value async for value in reports(work)]

    return asyncio.run(collect())


def _chips(prompt: str, tokenizer: CLIPTokenizer, **options: Any) -> dict[str, bool]:
    words, _ = words_of(prompt, tokenizer, **options)
    return {"|".join(word.pieces): word.chosen for word in words if word.name}


def test_nouns_are_chosen_and_token_splits_shown(tokenizer: CLIPTokenizer) -> None:
    assert _chips("an elephant with a sombrero", tokenizer) == {
        "an": False,
        "elephant": True,
        "with": False,
        "a": False,
        "som|brero": True,
    }
    assert _chips("a [red] cat", tokenizer) == {"a": False, "red": True, "cat": False}
    assert "No noun" in words_of("quickly", tokenizer)[1]
    assert "very frog” is cut" in words_of("a cat " + "very " * 80 + "frog", tokenizer)[1]


def test_what_was_clicked_stays_while_the_prompt_is_edited(tokenizer: CLIPTokenizer) -> None:
    words, _ = words_of("a cat and a cat", tokenizer)
    words = tuple(
        replace(word, negated=True, target=0.25, touched=True) if word.name == "cat#2" else word
        for word in words
    )
    again, _ = words_of("a cat and a cat, a frog", tokenizer, earlier=words_from(words_document(words, "")))
    assert subjects_of(again) == (Subject("cat", 1.0), Subject("cat#2", 0.25, True), Subject("frog", 1.0))


@pytest.mark.parametrize("subjects", [(Subject("cat", 1.0),), ()])
def test_what_a_link_leaves_out_stays_left_out(
    tokenizer: CLIPTokenizer, subjects: tuple[Subject, ...]
) -> None:
    form = Form.from_query(Form("a cat and a frog", subjects).to_query())
    words, note = words_of(form.prompt, tokenizer, form.subjects)
    again, _ = words_of(form.prompt, tokenizer, earlier=words_from(words_document(words, note)))
    assert subjects_of(words) == subjects_of(again) == subjects


def test_a_choice_outlives_the_model_but_not_its_tokens(tokenizer: CLIPTokenizer) -> None:
    words, _ = words_of("a sombrero", tokenizer, ())
    elsewhere = [replace(word, pieces=(word.text,)) for word in words]
    assert words_of("a sombrero", tokenizer, earlier=elsewhere)[0] == words


def test_a_link_says_everything() -> None:
    form = Form(
        "a “cat” & a frog",
        (Subject("frog", 0.7), Subject("cat", negated=True)),
        method="reweight",
        sigma=0.7071067811865476,
        pictures=3,
        seed=2**40,
        width=96,
    )
    assert Form.from_query(form.to_query()) == form
    with pytest.raises(ValueError, match="steps=many"):
        Form.from_query("steps=many")


def test_the_method_stands_beside_the_plain_model(drawn: Drawn) -> None:
    plain, excited = drawn.files.values()
    assert [read_origin(path).settings.method.name for path in (plain[0], excited[1])] == [
        "stable-diffusion",
        "attend-excite",
    ]
    assert read_origin(excited[1]).seed == 1
    assert plain[0].read_bytes() != excited[0].read_bytes()
    assert sorted(path.suffix for path in drawn.extras) == [".json", ".png", ".png", ".png"]
    recipe = next(path for path in drawn.extras if path.suffix == ".json")
    assert Recipe.from_dict(json.loads(recipe.read_text())) == drawn.recipe
    first, last = (overlays(drawn, 0, step) for step in (0, 3))
    assert [len(row) for row in first.values()] == [2, 2]
    assert first["Attend-and-Excite"][0].tobytes() != last["Attend-and-Excite"][0].tobytes()


def test_a_dropped_picture_comes_out_the_same(server: Server, drawn: Drawn) -> None:
    *_, again = _run(partial(draw_again, server, drawn.files["Attend-and-Excite"][1]))
    assert isinstance(again, Redrawn)
    assert (again.differing, again.notes) == (0, [])


def test_all_methods_are_compared_and_refusals_told(server: Server) -> None:
    *_, five = _run(partial(compare, server, replace(FORM, steps=2)))
    assert len(five.files) == 5
    *_, four = _run(partial(compare, server, replace(FORM, prompt="a cat", steps=1)))
    assert len(four.files) == 4
    assert "cannot be split" in four.refused["Composable Diffusion"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "cat " * MAX_PROMPT}, "characters"),
        ({"prompt": "a [cat"}, "unbalanced brackets"),
        ({"subjects": ()}, "name at least one"),
        ({"subjects": (Subject("dog"),)}, "not in the prompt"),
        ({"prompt": "a " + " cat" * 17, "subjects": tuple(map(Subject, _CATS))}, "subjects is 17"),
        ({"steps": 1000}, "steps is 1000"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": -1}, "a seed is -1"),
        ({"width": 4096}, "at most 32768 pixels"),
        ({"max_refinements": 10**9}, "at most 50"),
        ({"method": "magic"}, "unknown method"),
        ({"method": "composable", "prompt": "a cat AND " * 10 + "a dog"}, "number of concepts is 11"),
        ({"model": "someone/else"}, "is not served here"),
    ],
)
def test_too_much_and_nonsense_are_refused(server: Server, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run(partial(draw, server, replace(FORM, **change)))


def test_too_many_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="number of pictures is 1000000000"):
        Form(pictures=10**9)


def test_what_a_dropped_picture_says_is_not_trusted(server: Server, drawn: Drawn, tmp_path: Path) -> None:
    origin = read_origin(drawn.files["Attend-and-Excite"][0])
    recipe = drawn.recipe
    assert recipe is not None
    greedy = AttendAndExcite(recipe=replace(recipe, thresholds=((0.0, 1.0),), max_refinements=10**6))
    for settings, message in (
        (replace(origin.settings, model="/etc"), "is not served here"),
        (replace(origin.settings, method=greedy), "refinements is 1000000"),
        (replace(origin.settings, width=8000), "at most 32768 pixels"),
    ):
        write_png(tmp_path / "bad.png", Image.new("RGB", (8, 8)), replace(origin, settings=settings))
        with pytest.raises(ValueError, match=message):
            _run(partial(draw_again, server, tmp_path / "bad.png"))
    whole = drawn.files["Attend-and-Excite"][0].read_bytes()
    for content, message in (
        (b"no picture", "'bad.png' is not a PNG"),
        (whole[: -len(whole) // 2], "'bad.png' is broken"),
    ):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            _run(partial(draw_again, server, tmp_path / "bad.png"))
        assert str(tmp_path) not in str(caught.value)


def test_a_run_that_nobody_waits_for_ends_and_leaves_the_model_clean(
    server: Server, same_model: Callable[[Model], Callable[[], None]]
) -> None:
    check = same_model(server.models.get(""))
    seen = []

    async def leave_early() -> None:
        async with aclosing(reports(partial(draw, server, replace(FORM, steps=100)))) as run:
            async for value in run:
                seen.append(value)
                if value.doing == "Attend-and-Excite":
                    break

    asyncio.run(leave_early())
    # The next to use the model waits until the run has left it.
    with server.models.in_use:
        check()
    assert seen[-1].done < 150
    assert not any(isinstance(value, Drawn) for value in seen)


def test_stop_does_not_wait_for_the_refinements_of_a_step(server: Server) -> None:
    # With no step to speak of no threshold is met, and every one takes all its refinements.
    form = replace(FORM, recipe="official", step_size=1e-9, max_refinements=50)
    model, passes = server.models.get(""), 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    async def leave_with_the_plain_picture() -> None:
        nonlocal passes
        async with aclosing(reports(partial(draw, server, form))) as run:
            async for value in run:
                if value.done == form.steps:
                    break
        passes = 0

    with model.unet.register_forward_pre_hook(count):
        _run(partial(draw, server, form))
        assert passes > 60
        asyncio.run(leave_with_the_plain_picture())
        with server.models.in_use:
            assert passes < 10


def test_a_kept_run_has_the_maps_of_its_subjects_alone(drawn: Drawn) -> None:
    kept = drawn.with_maps["Attend-and-Excite"]
    assert kept.maps.values.shape[-1] == 2
    assert kept.maps["frog"].values.shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="not kept"):
        kept.maps["and"]


def test_texts_of_others_are_only_shown(drawn: Drawn) -> None:
    bad = "<img src=x onerror=alert(1)>"
    prompt = replace(drawn.prompt, text=bad)
    assert bad not in views.drawn_view(replace(drawn, prompt=prompt), 0)
    entries = history.with_run([], replace(drawn, prompt=prompt))
    assert bad not in views.history_view(history.entries(entries))
    assert history.entries([{**entries[0], "pictures": ["http://elsewhere/x.png"]}, "nonsense"]) == []


def test_the_server_keeps_only_the_latest_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attend_excite.app.actions.KEPT_RUNS", 3)
    server = Server(Models([str(tiny_folder)]), tmp_path)
    folders = [server.new_folder() for _ in range(5)]
    assert sorted(tmp_path.iterdir()) == sorted(folders[-3:])


@pytest.fixture(scope="module")
def address(tiny_folder: Path) -> Iterator[str]:
    from attend_excite.app.page import serving

    with serving([str(tiny_folder)]) as page:
        yield page.local_url


def test_programs_call_the_same_functions(address: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    assert address.startswith("http://127.0.0.1:")
    client = Client(address, download_files=tmp_path, verbose=False)
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(endpoints) == ["/compare", "/generate", "/reproduce", "/words"]
    words = client.predict("a cat and a frog", api_name="/words")["words"]
    assert [word["name"] for word in words if word["chosen"]] == ["cat", "frog"]
    job = client.submit(
        "a cat and a frog", subjects=["frog=0.7"], recipe="no-refinement", steps=4, api_name="/generate"
    )
    assert [report.get("step") for report in job][:8] == list(range(1, 9))
    made = job.result()
    (picture,) = made["pictures"]["Attend-and-Excite"]
    origin = read_origin(Path(picture))
    assert origin.settings.subjects == (Subject("frog", 0.7),)
    again = client.predict(handle_file(picture), api_name="/reproduce")
    assert again["differing_pixels"] == 0
    assert Path(again["picture"]).read_bytes() == Path(picture).read_bytes()
    with pytest.raises(AppError, match="the prompt is empty"):
        client.predict("", api_name="/generate")
    with pytest.raises(AppError, match="was not uploaded"):
        client.predict({"path": "/etc/passwd"}, api_name="/reproduce")


def test_a_login_is_asked_for(tiny_folder: Path) -> None:
    import httpx

    from attend_excite.app.page import serving

    with serving([str(tiny_folder)], login=("ann", "secret")) as page:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        with httpx.Client(base_url=page.local_url) as client:
            assert client.post("/login", data={"username": "ann", "password": "no"}).status_code == 400
            client.post("/login", data={"username": "ann", "password": "secret"}).raise_for_status()
            client.get("/config").raise_for_status()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "ann"], "give --user and --password"),
        (["--model", str(Path(__file__).parent)], "not a model in diffusers layout"),
    ],
)
def test_mistakes_on_the_command_line_are_sentences(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["app", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    result = CliRunner().invoke(app, ["app"])
    assert "pip install 'attend-excite[web]'" in " ".join(result.output.split())

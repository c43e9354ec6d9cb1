"""What the page does, without a browser: its functions, its limits, and its API."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from attend_excite import Model, Recipe, Subject
from attend_excite.cli import app
from attend_excite.guidance.schedule import NoiseSearch
from attend_excite.metadata import read_origin, write_png
from attend_excite.methods import AttendAndExcite, ComposableDiffusion
from attend_excite.models.additions import Addition
from attend_excite.models.reading import unread_tokens
from tests import families

pytest.importorskip("gradio", reason="the web page needs gradio")

from attend_excite.app import history, views
from attend_excite.app.actions import (
    Drawn,
    Progress,
    Redrawn,
    Server,
    compare,
    draw,
    draw_again,
    kept,
    overlays,
)
from attend_excite.app.api import visitor_of
from attend_excite.app.forms import Form
from attend_excite.app.jobs import Line, Stops, reports
from attend_excite.app.limits import MAX_BODY, MAX_PROMPT
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


def test_pictures_are_begun_from_a_visitors_own(server: Server, tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").resize((128, 128)).save(tmp_path / "mine.png")
    right = Image.new("L", (128, 128))
    right.paste(255, (64, 0, 128, 128))
    right.save(tmp_path / "mask.png")
    images = {"image": str(tmp_path / "mine.png"), "mask": str(tmp_path / "mask.png")}
    form = replace(FORM, strength=0.5, **images)
    *steps, last = _run(partial(draw, server, form))
    assert [step.total for step in steps] == [4] * 4
    (file,) = last.files["Attend-and-Excite"]
    left = (0, 0, 64, 128)
    with Image.open(file) as drawn, Image.open(tmp_path / "mine.png") as mine:
        assert drawn.crop(left).tobytes() == mine.crop(left).tobytes()
        assert drawn.tobytes() != mine.tobytes()
    settings = read_origin(file).settings
    assert settings.image is not None
    assert (settings.image.path, settings.strength) == ("mine.png", 0.5)
    # What a dropped file names is not opened.
    with pytest.raises(ValueError, match=r"it was made from another picture, 'mine.png', which isn't in it"):
        _run(partial(draw_again, server, file))


@pytest.mark.parametrize(
    "make",
    [families.clip_tokenizer, families.t5_tokenizer, families.gemma_tokenizer, families.qwen_tokenizer],
)
def test_words_are_the_same_whatever_a_tokenizer_puts_around_them(make: Callable[[], Any]) -> None:
    words, note = words_of("a cat and a yellow frog", make(), unread_of=lambda ids: {ids[-1]})
    assert ["".join(word.pieces) for word in words] == ["a", "cat", "and", "a", "yellow", "frog"]
    assert [word.text for word in words if word.chosen] == ["cat", "frog"]
    # Of those without a token behind the text the last one is of its last word.
    behind = make in (families.clip_tokenizer, families.t5_tokenizer)
    assert [word.text for word in words if word.unread] == ([] if behind else ["frog"])
    assert bool(note) is not behind


def test_what_was_clicked_stays_while_the_prompt_is_edited(tokenizer: CLIPTokenizer) -> None:
    words, _ = words_of("a cat and a cat", tokenizer)
    words = tuple(
        replace(word, negated=True, target=0.25, clicked_in="a cat and a cat")
        if word.name == "cat#2"
        else word
        for word in words
    )
    again, _ = words_of("a cat and a cat, a frog", tokenizer, earlier=words_from(words_document(words, "")))
    assert subjects_of(again) == (Subject("cat", 1.0), Subject("cat#2", 0.25, True), Subject("frog", 1.0))


@pytest.mark.parametrize("change", [{"target": 10**400}, {"target": "much"}, {"pieces": 1}])
def test_words_that_nobody_clicked_are_refused(tokenizer: CLIPTokenizer, change: dict[str, Any]) -> None:
    document = words_document(*words_of("a cat", tokenizer))
    document["words"][1] |= change
    with pytest.raises(ValueError, match="cannot be read: load the page again"):
        words_from(document)


@pytest.mark.parametrize(
    ("prompt", "stays"),
    [
        ("a horse and a doghouse", True),
        ("a big horse and a dog", True),
        ("a cat and a frog", False),
        ("a", False),
    ],
)
def test_a_click_goes_with_the_prompt_that_it_belonged_to(
    tokenizer: CLIPTokenizer, prompt: str, stays: bool
) -> None:
    words, _ = words_of("a horse and a dog", tokenizer)
    clicked = [replace(word, chosen=True, clicked_in="a horse and a dog") for word in words[:1]]
    again, _ = words_of(prompt, tokenizer, earlier=clicked)
    assert again[0].chosen is stays


@pytest.mark.parametrize("name", ["stickers", "stickers_joint"])
def test_words_that_the_model_never_read_are_marked(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    words, note = words_of(
        "a cat and a purple wombat", model.tokenizer, unread_of=partial(unread_tokens, model)
    )
    assert [word.text for word in words if word.unread] == ["wombat"]
    assert "never read “wombat”" in note


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
        best=True,
        best_of=3,
        negative="a hat, “blurred”",
        scheduler="dpm++",
        seed=2**40,
        width=96,
    )
    assert Form.from_query(form.to_query()) == form
    with pytest.raises(ValueError, match="steps=many"):
        Form.from_query("steps=many")
    with pytest.raises(ValueError, match="the link has 200000 characters: at most 100000 are read here"):
        Form.from_query("x" * 200_000)


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
        ({"prompt": "a \ud800 cat"}, "the prompt has half a character"),
        ({"subjects": ()}, "name at least one"),
        ({"subjects": (Subject("dog"),)}, "not in the prompt"),
        ({"prompt": "a " + " cat" * 17, "subjects": tuple(map(Subject, _CATS))}, "subjects is 17"),
        ({"steps": 1000}, "steps is 1000"),
        ({"steps": 0}, "steps is 0: it must be 1 to 100"),
        ({"guidance": float("nan")}, "guidance"),
        ({"negative": "hat " * MAX_PROMPT}, "the negative prompt has 2000 characters"),
        ({"subjects": (Subject("cat" * MAX_PROMPT),)}, "a subject has 1500 characters"),
        (
            {"subjects": (Subject("cat", attributes=["a"] * 9),)},
            "the number of attributes is 9: it must be at m",
        ),
        ({"subjects": (Subject("cat", attributes=["a" * 501]),)}, "an attribute has 501 characters"),
        ({"recipe": "official" * MAX_PROMPT}, "a name has 4000 characters"),
        ({"scheduler": "euler?"}, "unknown scheduler"),
        ({"best": True}, "nobody can tell which picture is the best"),
        ({"best_of": 99}, "the number of noises is 99: it must be 1 to 8"),
        ({"best_of": 2, "method": "composable"}, "never shows the model the whole prompt"),
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
    greedy = AttendAndExcite(recipe=replace(recipe, thresholds=((0.0, 1.0),), max_refinements=999))
    endless = AttendAndExcite(recipe=replace(recipe, search=NoiseSearch(rounds=100)))
    terms = recipe.terms * 9
    many = AttendAndExcite(recipe=replace(recipe, terms=terms))
    searched = AttendAndExcite(recipe=replace(recipe, search=NoiseSearch(terms=terms, enough=())))
    for settings, message in (
        (replace(origin.settings, model="/etc"), "is not served here"),
        (replace(origin.settings, method=greedy), "refinements is 999"),
        (replace(origin.settings, width=8000), "at most 32768 pixels"),
        (replace(origin.settings, best_of=900), "the number of noises is 900"),
        (
            replace(origin.settings, method=endless),
            "the passes of the search is 1050: it must be at most 200",
        ),
        (replace(origin.settings, method=many), "the number of terms is 9: it must be at most 8"),
        (replace(origin.settings, method=searched), "the number of terms of the search is 9"),
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


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ({"loras": (Addition("style.safetensors", "0" * 16),)}, "it was drawn with LoRAs, which"),
        ({"embeddings": (Addition("toy.pt", "0" * 16),)}, "drawn with words of textual inversion, which"),
        ({"vae": Addition("vae", "0" * 16)}, "drawn with another autoencoder, which the page does without"),
    ],
)
def test_a_picture_of_more_than_a_model_is_left_to_the_command_line(
    server: Server, drawn: Drawn, tmp_path: Path, added: dict[str, Any], told: str
) -> None:
    origin = read_origin(drawn.files["Attend-and-Excite"][0])
    settings = replace(origin.settings, **added)
    write_png(tmp_path / "mine.png", Image.new("RGB", (8, 8)), replace(origin, settings=settings))
    with pytest.raises(ValueError, match=f"{told}.*generate --from"):
        _run(partial(draw_again, server, tmp_path / "mine.png"))
    with pytest.raises(ValueError, match=told):
        Form.from_settings(settings, 0, server.models.get(""))


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

    with model.network.register_forward_pre_hook(count):
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
    entry = history.entry_of(replace(drawn, prompt=prompt))
    entries = history.entries(f"[{entry}]")
    assert len(entries) == 1
    assert bad not in views.history_view(entries)
    assert (
        history.entries(json.dumps([{**entries[0], "pictures": ["http://elsewhere/x.png"]}, "nonsense"]))
        == []
    )
    assert history.entries(json.dumps([{**entries[0], "files": {"plain": "x"}}])) == []
    assert history.entries("[" * 100_000) == []


def test_history_brings_pictures_back_and_nothing_else(server: Server, drawn: Drawn) -> None:
    (entry,) = history.entries(f"[{history.entry_of(drawn)}]")
    back = kept(server, entry["folder"], entry["files"])
    assert back is not None
    assert (back.files, list(back.seeds), back.prompt) == (drawn.files, [0, 1], drawn.prompt)
    folder = Path(__file__).parent.parent / "docs" / "results" / "stickers" / "figures"
    assert kept(server, f"../../../..{folder}", {"plain": ["pairs.png"]}) is None
    assert kept(server, entry["folder"], {"plain": [f"../../../..{folder}/pairs.png"]}) is None
    assert kept(server, entry["folder"], {"recipe": ["recipe.json"]}) is None


@pytest.mark.parametrize(
    "forge",
    [
        lambda folder, files: ("..", files),
        lambda folder, files: ("", files),
        lambda folder, files: (f"../{folder}", files),
        lambda folder, files: ("x" * 300, files),
        lambda folder, files: (f"{folder}\0", files),
        lambda folder, files: (folder, {"plain": ["x" * 300 + ".png"]}),
        lambda folder, files: (folder, {"plain": [".."]}),
        lambda folder, files: (folder, {f"method {n}": row for n in range(99) for row in files.values()}),
        lambda folder, files: (folder, {"plain": [], **files}),
        lambda folder, files: (folder, {"plain": next(iter(files.values()))[:1], **files}),
        lambda folder, files: (folder, {"x" * 300: next(iter(files.values()))}),
        lambda folder, files: (folder, {}),
    ],
)
def test_a_forged_memory_brings_nothing_back(
    server: Server, drawn: Drawn, forge: Callable[..., tuple[str, dict[str, list[str]]]]
) -> None:
    (entry,) = history.entries(f"[{history.entry_of(drawn)}]")
    # Outside the server's folder lies a picture, too.
    outside = server.folder.parent / next(iter(entry["files"].values()))[0]
    outside.write_bytes(next(iter(drawn.files.values()))[0].read_bytes())
    try:
        assert kept(server, *forge(entry["folder"], entry["files"])) is None
    finally:
        outside.unlink()


def test_a_picture_fills_the_form_in(server: Server, drawn: Drawn) -> None:
    model = server.models.get("")
    origin = read_origin(drawn.files["Attend-and-Excite"][1])
    form = Form.from_settings(origin.settings, origin.seed, model)
    assert (form.recipe, form.sigma, form.seed) == ("no-refinement", None, 1)
    assert form.settings(model) == origin.settings
    changed = replace(form, sigma=0.25, scheduler="euler", negative="a hat")
    assert Form.from_settings(changed.settings(model), 1, model) == changed
    assert isinstance(origin.settings.method, AttendAndExcite)
    assert isinstance(origin.settings.method.recipe, Recipe)
    named = Form(method="conform", sigma=0.25)
    back = Form.from_settings(named.settings(model), 0, model)
    assert (back.method, back.recipe, back.sigma, back.step_size) == ("conform", "recommended", 0.25, None)
    assert back.settings(model) == named.settings(model)
    other = replace(origin.settings.method, recipe=replace(origin.settings.method.recipe, temperature=3.0))
    weighted = ComposableDiffusion(weights=(7.5, 5.0))
    said = replace(origin.settings, subjects=(Subject("cat", attributes=["red"]),))
    for settings in (
        replace(origin.settings, method=other),
        replace(origin.settings, method=replace(origin.settings.method, word_tokens="max")),
        replace(origin.settings, method=weighted),
        said,
    ):
        with pytest.raises(ValueError, match="no place for"):
            Form.from_settings(settings, 1, model)


def test_the_server_keeps_only_the_latest_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attend_excite.app.actions.KEPT_RUNS", 3)
    server = Server(Models([str(tiny_folder)]), tmp_path)
    folders = [server.new_folder() for _ in range(5)]
    assert sorted(tmp_path.iterdir()) == sorted(folders[-3:])


def test_the_line_keeps_its_order_and_nobody_fills_it() -> None:
    line = Line(most=3, most_each=1)
    with ExitStack() as stack:
        first, second, _ = (stack.enter_context(line.place(who)) for who in ("ann", "bob", "ann"))
        assert (line.before(first), line.before(second)) == (0, 1)
        with pytest.raises(ValueError, match="from your address"), line.place("ann"):
            pass
        with (
            line.place("eve"),
            pytest.raises(ValueError, match="too many runs are waiting"),
            line.place("joe"),
        ):
            pass
    with line.place("ann") as again:
        assert line.before(again) == 0


def test_who_runs_is_not_counted_among_those_who_wait() -> None:
    line = Line(most=20, most_each=5)
    with ExitStack() as stack:
        for who in ["eve", *["ann"] * 5]:
            stack.enter_context(line.place(who))
        with pytest.raises(ValueError, match="from your address"), line.place("ann"):
            pass
        for number in range(15):
            stack.enter_context(line.place(f"visitor {number}"))
        with pytest.raises(ValueError, match="too many runs are waiting"), line.place("joe"):
            pass


def test_a_loaded_model_does_not_wait_for_one_that_is_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()

    class Loaded:
        """Stands for a model."""

    def load(name: str) -> Loaded:
        if name == "large":
            loading.set()
            assert go_on.wait(60)
        return Loaded()

    monkeypatch.setattr("attend_excite.app.models.load", load)
    models = Models(["small", "large"])
    small = models.get("small")
    with ThreadPoolExecutor() as pool:
        try:
            large = [pool.submit(models.get, "large") for _ in range(2)]
            assert loading.wait(60)
            assert pool.submit(models.get, "small").result(60) is small
        finally:
            go_on.set()
        assert large[0].result() is large[1].result()


def test_others_are_answered_while_a_form_is_read(server: Server) -> None:
    from attend_excite.app.guard import Listeners
    from attend_excite.app.page import _House

    answered = threading.Event()

    def read(*_: Any) -> Form:
        raise ValueError("it was answered" if answered.wait(30) else "nobody was answered")

    async def press_draw() -> list[Any]:
        house, asking = _House(server, Listeners()), SimpleNamespace(read=read)
        run = house.run(asking, draw, "stage", "unfinished", "drawn")
        asyncio.get_running_loop().call_later(0.1, answered.set)
        return [shown async for shown in run(SimpleNamespace(session_hash="mine"), house.ticket())]

    assert "It was answered" in asyncio.run(press_draw())[-1]["stage"]


@pytest.mark.parametrize("ticket", [None, "", "9" * 5000, "x"])
def test_nothing_runs_with_a_forged_ticket(server: Server, ticket: str | None) -> None:
    from attend_excite.app.guard import Listeners
    from attend_excite.app.page import _House

    async def ask() -> list[Any]:
        run = _House(server, Listeners()).run_again("stage", "unfinished", "use")
        return [shown async for shown in run(SimpleNamespace(session_hash="mine"), ticket, "mine.png")]

    assert asyncio.run(ask()) == []


def test_stop_is_for_what_was_asked_before_it() -> None:
    stops = Stops()
    early = stops.ticket()
    stops.press("ann")
    late = stops.ticket()
    assert [stops.wanted("ann", ticket) for ticket in (early, late)] == [False, True]
    assert stops.wanted("bob", early)
    for number in range(2000):
        stops.press(f"visitor {number}")
    assert len(vars(stops)["_pressed"]) == 1000


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


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("words", {"prompt": "a cat", "model": 5}, "model is 5: it must be a text"),
        ("words", {"prompt": {"a": "cat"}}, "prompt is {'a': 'cat'}: it must be a text"),
        ("generate", {"prompt": "a cat", "pictures": "two"}, "pictures is 'two': it must be a whole number"),
        ("generate", {"prompt": "a cat", "seed": 0.5}, "seed is 0.5: it must be a whole number"),
        ("generate", {"prompt": "a cat", "steps": True}, "steps is True"),
        ("generate", {"prompt": "a cat", "steps": 0}, "steps is 0: it must be 1 to 100"),
        ("generate", {"prompt": "a cat", "guidance": "7"}, "guidance is '7': it must be a number"),
        (
            "generate",
            {"prompt": "a cat", "width": [64]},
            "width is [64]: it must be a whole number, or nothing",
        ),
        ("generate", {"prompt": "a cat", "subjects": [1, 2]}, "subjects must be a list of texts"),
        ("generate", {"prompt": "a cat", "subjects": {"cat": 1}}, "subjects must be a list of texts"),
        ("generate", {"prompt": "a cat", "subjects": ["cat" * 1000]}, "a subject has 3000 characters"),
        ("compare", {"prompt": 1}, "prompt is 1: it must be a text"),
        ("reproduce", {"picture": "me.png"}, "the picture is no file"),
        ("reproduce", {"picture": {"path": 3}}, "the picture is no file"),
        ("reproduce", {"picture": None}, "the picture is no file"),
    ],
)
def test_wrong_types_are_answered_in_a_sentence(
    address: str, name: str, values: dict[str, Any], told: str
) -> None:
    import httpx

    call = f"{address}gradio_api/call"
    event = httpx.post(f"{call}/v2/{name}", json=values).json()["event_id"]
    answer = httpx.get(f"{call}/{name}/{event}", timeout=60).text
    assert "event: error" in answer
    assert told in answer


@pytest.mark.parametrize(
    ("path", "values", "told"),
    [
        ("words", {"data": ["a cat"]}, "takes a list of 2 values as its data: prompt, model"),
        ("words", {"data": "a cat"}, "takes a list of 2 values"),
        ("words", ["a cat", ""], "a call is an object"),
        ("words", {"data": ["a cat", ""], "session_hash": "mine"}, "leave session_hash out"),
        ("v2/words", {}, "words needs prompt"),
        ("v2/words", {"prompt": "a cat", "colour": "red"}, "takes no colour: it takes prompt, model"),
        ("dream", {"data": []}, "choose one of words, generate, compare, reproduce"),
    ],
)
def test_a_call_of_the_wrong_shape_is_answered_in_a_sentence(
    address: str, path: str, values: Any, told: str
) -> None:
    import httpx

    answer = httpx.post(f"{address}gradio_api/call/{path}", json=values)
    assert answer.status_code == 400
    assert told in answer.json()["detail"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"data": [], "fn_index": 9999}, "the page has no such function"),
        ({"data": [], "fn_index": -1}, "the page has no such function"),
        ({"data": [], "fn_index": True}, "the page has no such function"),
        ({"data": []}, "the page has no such function"),
        ({"data": [], "fn_index": 0}, "takes a list of 3 values"),
        ({"data": "cat", "fn_index": 0}, "takes a list of 3 values"),
        ([0], "a call is an object"),
    ],
)
def test_a_forged_call_of_the_page_is_answered_in_a_sentence(address: str, values: Any, told: str) -> None:
    import httpx

    if isinstance(values, dict):
        values = values | {"session_hash": "mine"}
    for path in ("queue/join", "run/predict", "api/words"):
        answer = httpx.post(f"{address}gradio_api/{path}", json=values)
        assert answer.status_code == 400
        assert told in answer.json()["error"]


_UPLOADED = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
_NESTED = {"words": [{"text": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}]}
_FORGED: dict[str, list[Any]] = {
    "textbox": [None, 5, ["a cat"]],
    "dropdown": [None, 5, ["official"]],
    "slider": [None, "x", True, 10**400],
    "number": ["x", False, -(10**400), [1]],
    "checkbox": [None, 1, "true"],
    "image": ["cat.png", {}, {"path": 3}, _UPLOADED, {**_UPLOADED, "path": "http://127.0.0.1/x.png"}],
    "file": [
        "cat.png",
        [_UPLOADED],
        _UPLOADED,
        {**_UPLOADED, "path": "\0"},
        {**_UPLOADED, "path": "x" * 5000},
    ],
    "dataset": [None, -1, 0.5, True, "0"],
    "html": [None, "words", {"words": "cat"}, _NESTED, {"words": [{"target": 10**400}]}],
}


def test_what_no_part_of_the_page_sends_is_refused_in_a_sentence(address: str) -> None:
    import httpx

    config = httpx.get(f"{address}config").json()
    parts = {part["id"]: part for part in config["components"]}
    fine: dict[str, Any] = {"textbox": "", "slider": 1, "dropdown": "", "checkbox": True, "dataset": 0}
    fine |= {"html": {"words": [], "note": "", "prompt": ""}}
    tried = set()
    with httpx.Client(base_url=f"{address}gradio_api") as client:
        for function in config["dependencies"]:
            kinds = [parts[number]["type"] for number in function["inputs"]]
            for at, kind in enumerate(kinds):
                for forged in () if not function["backend_fn"] else _FORGED.get(kind, ()):
                    data = [fine.get(each) for each in kinds]
                    data[at] = forged
                    call = {"data": data, "fn_index": function["id"], "session_hash": "mine"}
                    answer = client.post("/queue/join", json=call)
                    assert answer.status_code == 400
                    told = (
                        f"value {at + 1} is {repr(forged)[:40]}, which no {kind} sends: load the page again"
                    )
                    assert answer.json()["error"] == told
                    tried.add(kind)
    assert tried == _FORGED.keys()


def _call(address: str, name: str, **values: Any) -> tuple[int, str]:
    """What a function of the page that answers at once says to a visitor's browser."""
    import httpx

    functions = httpx.get(f"{address}config").json()["dependencies"]
    number = next(each["id"] for each in functions if each["api_name"] == name)
    answer = httpx.post(
        f"{address}gradio_api/run/predict", json={"fn_index": number, "session_hash": "m", **values}
    )
    return answer.status_code, answer.text


def test_a_click_on_nothing_is_answered_in_a_sentence(address: str, tiny_folder: Path) -> None:
    for click in (None, {}, {"index": "0"}, {"index": -1}, {"index": True}, {"index": 0, "more": []}, [0]):
        for name, data in (("_choose", [None]), ("restore_remembered", ["[]"])):
            status, told = _call(address, name, data=data, event_data=click)
            assert (status, "which is of no part" in told) == (400, True)
    assert _call(address, "_choose", data=[None], event_data={"index": 0})[0] == 200
    status, told = _call(address, "restore_remembered", data=["[]"], event_data={"index": 999})
    assert "there is no earlier run 1000: load the page again" in told
    status, told = _call(address, "_take_example", data=[999, str(tiny_folder)])
    assert "there is no example 1000: load the page again" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"data": [NaN], "fn_index": 0}', "a number is none, as NaN"),
        (b'{"data": [1e400], "fn_index": 0}', "or too large"),
        (b'{"data": ["a \\ud800 cat", null, ""], "fn_index": 0}', "half a character"),
    ],
)
def test_a_body_of_what_is_nothing_is_answered_in_a_sentence(address: str, content: bytes, told: str) -> None:
    import httpx

    for path in ("run/predict", "call/words", "queue/join"):
        answer = httpx.post(f"{address}gradio_api/{path}", content=content)
        assert (answer.status_code, told in answer.json()["error"]) == (400, True)


def test_visitors_of_a_tunnel_are_told_apart() -> None:
    def asks(session: str, host: str) -> Any:
        return SimpleNamespace(session_hash=session, client=SimpleNamespace(host=host))

    here = [visitor_of(asks(session, "127.0.0.1"), tunnelled=True)[1] for session in ("a", "b", "a")]
    assert here[0] == here[2] != here[1]
    assert visitor_of(asks("a", "192.0.2.7"), tunnelled=True) == ("a", "192.0.2.7")
    assert visitor_of(asks("a", "127.0.0.1"), tunnelled=False) == ("a", "127.0.0.1")


def test_requests_are_no_larger_than_the_page_needs(address: str) -> None:
    import httpx

    join, session = f"{address}gradio_api/queue/join", {"data": [], "fn_index": 0, "session_hash": "s" * 65}
    large = httpx.post(join, content=b'{"data": ["' + b"x" * MAX_BODY + b'"]}')
    assert (large.status_code, large.json()["detail"]) == (
        413,
        "the request is too large: at most 2097152 bytes are read here",
    )
    assert "at most 64 characters" in httpx.post(join, json=session).json()["detail"]
    assert httpx.post(join, content=b"[" * 100_000).status_code in (400, 422)


@pytest.mark.parametrize("path", ["call/upload", "call/v2/upload", "run/upload", "api/upload"])
def test_only_uploads_may_be_as_large_as_a_picture(address: str, path: str) -> None:
    import httpx

    call = f"{address}gradio_api/{path}"
    assert httpx.post(call, content=b'{"data": ["' + b"x" * MAX_BODY + b'"]}').status_code == 413
    assert httpx.post(call, json={"data": [], "fn_index": 9999}).status_code == 400
    picture = {"files": ("large.png", b"x" * (MAX_BODY + 1))}
    assert httpx.post(f"{address}gradio_api/upload", files=picture).status_code == 200
    many = [("files", (f"{k}.png", b"x" * (11 * MAX_BODY // 2))) for k in range(2)]
    assert httpx.post(f"{address}gradio_api/upload", files=many).status_code == 413
    chunks = iter([b"x"])
    assert httpx.post(f"{address}gradio_api/upload", content=chunks).status_code == 413


@pytest.mark.parametrize("path", ["process_recording", "process_recording/", "component_server", "stream/1"])
def test_what_the_page_does_not_have_is_not_there(address: str, path: str) -> None:
    import httpx

    answer = httpx.post(f"{address}gradio_api/{path}", files={"video": ("film.mp4", b"x")})
    assert (answer.status_code, answer.json()["error"]) == (404, "this page has no such thing")


@pytest.mark.parametrize(
    "path",
    [
        "file=https://example.org/x.png",
        "file/http://example.org/x.png",
        "file=https://example.org/x.png%3F/queue/data",
        "file=https://example.org/call/generate/1",
        "proxy=x",
    ],
)
def test_the_page_fetches_nothing_for_anybody(address: str, path: str) -> None:
    import httpx

    for ask in (httpx.get, httpx.head):
        assert ask(f"{address}gradio_api/{path}").status_code == 404
    assert httpx.get(f"{address}gradio_api/{path}").json()["error"] == "this page has no such thing"


def test_no_other_page_shows_this_one_in_a_frame(address: str) -> None:
    import httpx

    headers = httpx.get(address).headers
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert (headers["X-Frame-Options"], headers["X-Content-Type-Options"]) == ("DENY", "nosniff")


def test_a_run_that_nobody_listens_to_ends(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    ended = threading.Event()

    def endless(_: Server, form: Form, report: Any) -> None:
        try:
            while True:
                report(Progress("", 1, 1, 0, {}))
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr("attend_excite.app.api.draw", endless)
    monkeypatch.setattr("attend_excite.app.api.SILENCE", 0.3)
    httpx.post(f"{address}gradio_api/call/v2/generate", json={"prompt": "a cat"}).raise_for_status()
    assert ended.wait(60)


def test_a_login_is_asked_for(tiny_folder: Path) -> None:
    import httpx

    from attend_excite.app.page import serving

    with serving([str(tiny_folder)], login=("ann", "secret")) as page:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        with httpx.Client(base_url=page.local_url) as client:
            assert client.post("/login", data={"username": "ann", "password": "no"}).status_code == 400
            client.post("/login", data={"username": "ann", "password": "secret"}).raise_for_status()
            client.get("/config").raise_for_status()
            # Whatever address a visitor claims to come from.
            tries = [
                client.post(
                    "/login",
                    data={"username": "ann", "password": str(n)},
                    headers={"X-Forwarded-For": f"192.0.2.{n}"},
                )
                for n in range(20)
            ]
            assert {answer.status_code for answer in tries} == {400, 429}
            assert tries[-1].headers["Retry-After"] == "60"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "ann"], "give --user and --password"),
        (["--model", str(Path(__file__).parent)], "not a model in diffusers layout"),
        (["--host", "nope.invalid"], "nobody knows the host 'nope.invalid'"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--port", "99999"], "the port is 99999: it must be 1 to 65535"),
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

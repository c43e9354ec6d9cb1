"""The page as people use it, in a real Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pytest

pytest.importorskip("gradio", reason="the web page needs gradio")
pytest.importorskip("playwright", reason="driving a browser needs playwright")

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 30_000
"""Milliseconds that a slow machine may take for anything."""

_CONTRAST = """element => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const layers = [];
  for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
  const painted = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  };
  const behind = ["white", ...layers].map(painted).pop();
  const text = painted(getComputedStyle(element).color);
  return Math.max(behind, text) / Math.min(behind, text);
}"""
"""WCAG's contrast between a text and what it stands on."""

pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"there is no Chromium at {CHROMIUM}")


@pytest.fixture(scope="module")
def address(tiny_folder: Path) -> Iterator[str]:
    from attend_excite.app.page import serving

    with serving([str(tiny_folder)]) as page:
        yield page.local_url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )


@pytest.fixture(scope="module")
def visitor(browser: Browser) -> BrowserContext:
    return _visitor(browser)


@pytest.fixture
def page(visitor: BrowserContext) -> Iterator[Page]:
    page = visitor.new_page()
    yield page
    page.close()


def _visitor(browser: Browser) -> BrowserContext:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    return context


def _open(page: Page, address: str, **form: Any) -> Page:
    """The page as a link fills it in: short runs, unless told."""
    expect.set_options(timeout=PATIENCE)
    values = {"steps": 4, "recipe": "no-refinement", "seed": 1} | form
    page.goto(f"{address}?{'&'.join(f'{name}={quote(str(value))}' for name, value in values.items())}")
    # The address has been read.
    expect(page.get_by_label("First seed")).to_have_value(str(values["seed"]))
    return page


def _draw(page: Page) -> list[bytes]:
    """Press Draw and take the pictures away."""
    page.locator("#ae-draw").click()
    expect(page.locator("#ae-closer")).to_be_visible()
    links = page.locator("#ae-stage a")
    urls = [links.nth(index).evaluate("link => link.href") for index in range(links.count())]
    return [page.request.get(url).body() for url in urls]


def _set_steps(page: Page, steps: int) -> None:
    page.get_by_text("Model, steps and size").click()
    number = page.locator("#ae-steps input[type=number]")
    expect(number).to_be_visible()
    # Gradio builds what stands in an accordion as it opens, and then sets its value once more.
    page.wait_for_timeout(500)
    number.fill(str(steps))
    number.press("Enter")
    expect(number).to_have_value(str(steps))


def _chip(page: Page, word: str) -> Any:
    return page.locator(".ae-chip", has_text=word)


def test_from_a_prompt_to_two_pictures(page: Page, address: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    _open(page, address)
    page.locator("#ae-prompt textarea").fill("an elephant with a sombrero")
    expect(_chip(page, "som|brero")).to_have_attribute("aria-pressed", "true")
    expect(_chip(page, "with")).to_have_attribute("aria-pressed", "false")
    plain, excited = _draw(page)
    assert plain.startswith(b"\x89PNG")
    assert plain != excited
    expect(page.locator("#ae-stage h3")).to_have_text("an elephant with a sombrero")
    page.get_by_role("tab", name="Attention").click()
    expect(page.locator("#ae-maps img")).to_have_count(4)
    # The address is a link to what was drawn, and the page asks no other server for anything.
    assert "prompt=an+elephant+with+a+sombrero" in page.url
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    page.get_by_role("tab", name="History").click()
    expect(page.locator("#ae-history button")).to_have_text(re.compile("an elephant with a sombrero"))


def test_the_maps_follow_the_step(page: Page, address: str) -> None:
    _open(page, address)
    _draw(page)
    page.get_by_role("tab", name="Attention").click()
    image = page.locator("#ae-maps img").first
    last = image.get_attribute("src")
    page.locator("#ae-step input[type=range]").press("Home")
    expect(image).not_to_have_attribute("src", last or "")


def test_another_token_is_chosen_from_the_keyboard(page: Page, address: str) -> None:
    _open(page, address)
    both = _draw(page)
    _chip(page, "frog").press("Space")
    expect(_chip(page, "frog")).to_have_attribute("aria-pressed", "false")
    expect(page.locator(".ae-subjects li")).to_have_count(1)
    page.locator(".ae-subjects input").press("ArrowLeft")
    expect(page.locator(".ae-subjects output")).to_have_text("at least 95 %")
    page.locator("#ae-draw").click()
    page.wait_for_url("**subject=cat%3D0.95*")
    one = page.locator("#ae-stage a").last.evaluate("link => link.href")
    assert page.request.get(one).body() != both[1]


def test_a_link_brings_back_no_word_that_was_switched_off(page: Page, address: str) -> None:
    _open(page, address, subject="cat")
    expect(_chip(page, "frog")).to_have_attribute("aria-pressed", "false")
    _draw(page)
    page.get_by_role("tab", name="Attention").click()
    expect(page.locator("#ae-maps figcaption")).to_have_text(["cat", "cat"])
    page.wait_for_url("**subject=cat")
    _chip(page, "cat").click()
    page.locator("#ae-draw").click()
    expect(page.get_by_role("alert")).to_have_text("Choose at least one word.")


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("prompt=a+dog+and+a+crown&model=foo", "'foo' is not served here"),
        ("pictures=99", "The number of pictures is 99"),
        ("seed=99999999999999999999999", "A seed is 99999999999999999999999"),
        ("steps=99999999999999999999999", "Steps is 99999999999999999999999"),
        ("subject=zebra", "'zebra' is not in the prompt"),
    ],
)
def test_a_bad_link_is_told_in_a_sentence(page: Page, address: str, query: str, told: str) -> None:
    page.goto(f"{address}?{query}")
    expect(page.locator("#ae-stage").get_by_role("alert")).to_contain_text(told)


def test_a_copied_link_fills_the_page_in_again(page: Page, address: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    _open(page, address, prompt="a [cat] and a frog")
    page.locator("#ae-copy").click()
    expect(page.locator("#ae-copied").get_by_role("status")).to_have_text("Copied.")
    page.goto(page.evaluate("navigator.clipboard.readText()"))
    expect(page.locator("#ae-prompt textarea")).to_have_value("a cat and a frog")
    expect(_chip(page, "frog")).to_have_attribute("aria-pressed", "false")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.locator("#ae-copy").click()
    expect(page.locator("#ae-copied")).to_have_text("The link stands in the address bar.")
    page.locator("#ae-prompt textarea").fill("a [cat")
    page.locator("#ae-copy").click()
    expect(page.locator("#ae-copied")).to_contain_text("Unbalanced brackets")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_and_pale_text_can_be_read(page: Page, address: str, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    _open(page, address, prompt="a cat " + "very " * 80, subject="cat")
    page.locator("#ae-copy").click()
    expect(page.locator("#ae-copied .ae-note")).to_be_visible()
    for text in (
        "#ae-draw",
        "#ae-words .ae-note",
        "#ae-copied .ae-note",
        ".ae-header p",
        ".ae-footer",
        ".ae-empty",
        ".ae-chip[aria-pressed=true]",
        ".ae-subjects output",
        ".ae-cut",
        "#ae-seeds span",
    ):
        assert page.locator(text).first.evaluate(_CONTRAST) >= 4.5, text


def test_stop_ends_a_run_and_the_next_one_works(page: Page, address: str) -> None:
    _open(page, address, steps=100)
    for wait in (0, 100, 200):  # A step that is on its way must not be shown after all.
        page.locator("#ae-draw").click()
        expect(page.locator("#ae-stage progress")).to_be_visible()
        page.wait_for_timeout(wait)
        page.locator("#ae-stop").click()
        expect(page.locator("#ae-stage")).to_contain_text("Stopped")
    _set_steps(page, 4)
    assert len(_draw(page)) == 2


def test_stop_leaves_other_results_alone(page: Page, address: str) -> None:
    _open(page, address)
    _draw(page)
    _set_steps(page, 100)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#ae-compare").click()
    expect(page.locator("#ae-compare-stage progress")).to_be_visible()
    page.locator("#ae-stop").click()
    expect(page.locator("#ae-compare-stage")).to_contain_text("Stopped")
    page.get_by_role("tab", name="Pictures").click()
    expect(page.locator("#ae-stage a")).to_have_count(2)


def test_stop_holds_also_before_the_run_is_in_the_queue(page: Page, address: str) -> None:
    _open(page, address, steps=100, pictures=8)
    # A network that is so slow that the browser has not joined the queue.
    page.route("**/queue/join*", lambda route: (page.wait_for_timeout(700), route.continue_()))
    page.locator("#ae-draw").click()
    expect(page.locator("#ae-stage")).to_contain_text("Waiting for the model …")
    page.locator("#ae-stop").click()
    expect(page.locator("#ae-stage")).to_contain_text("Stopped")
    page.wait_for_timeout(2000)
    expect(page.locator("#ae-stage")).to_contain_text("Stopped")
    page.unroute_all()
    _set_steps(page, 2)
    assert len(_draw(page)) == 16


def test_a_visitor_who_waits_is_told_so(browser: Browser, address: str) -> None:
    first, second = (_open(_visitor(browser).new_page(), address, steps=100, pictures=8) for _ in range(2))
    first.locator("#ae-draw").click()
    expect(first.locator("#ae-stage progress")).to_be_visible()
    second.locator("#ae-draw").click()
    expect(second.locator("#ae-stage")).to_contain_text("Waiting for the model")
    second.locator("#ae-stop").click()
    expect(second.locator("#ae-stage")).to_contain_text("Stopped")
    second.locator("#ae-draw").click()
    expect(second.locator("#ae-stage")).to_contain_text("Waiting for the model")
    first.locator("#ae-stop").click()
    expect(second.locator("#ae-stage progress")).to_be_visible()
    second.locator("#ae-stop").click()
    for page in (first, second):
        expect(page.locator("#ae-stage")).to_contain_text("Stopped")
        page.context.close()


def test_stop_while_waiting_does_not_bring_the_earlier_run_back(browser: Browser, address: str) -> None:
    first, second = (_open(_visitor(browser).new_page(), address, steps=steps) for steps in (4, 100))
    _draw(first)
    second.locator("#ae-draw").click()
    expect(second.locator("#ae-stage progress")).to_be_visible()
    first.locator("#ae-draw").click()
    expect(first.locator("#ae-stage")).to_contain_text("Waiting for the model")
    first.locator("#ae-stop").click()
    expect(first.locator("#ae-stage")).to_contain_text("Stopped")
    first.wait_for_timeout(3000)
    expect(first.locator("#ae-stage")).to_contain_text("Stopped")
    second.locator("#ae-stop").click()
    for page in (first, second):
        page.context.close()


def test_a_visitor_who_finds_the_queue_full_is_told_so(
    browser: Browser, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attend_excite.app import limits
    from attend_excite.app.page import serving

    monkeypatch.setattr(limits, "MAX_WAITING", 1)
    with serving([str(tiny_folder)]) as served:
        visitors = [
            _open(_visitor(browser).new_page(), served.local_url, steps=100, pictures=8) for _ in range(3)
        ]
        for page, told in zip(visitors, (": step", "Waiting for the model", "Too many runs"), strict=True):
            page.locator("#ae-draw").click()
            expect(page.locator("#ae-stage")).to_contain_text(told)
        for page in visitors[:2]:
            page.locator("#ae-stop").click()
            expect(page.locator("#ae-stage")).to_contain_text("Stopped")
        for page in visitors:
            page.context.close()


def test_a_dropped_picture_comes_out_the_same(page: Page, address: str, tmp_path: Path) -> None:
    _open(page, address, seed=5)
    (tmp_path / "mine.png").write_bytes(_draw(page)[1])
    page.get_by_role("tab", name="Draw again").click()
    page.locator("#ae-drop input[type=file]").set_input_files(tmp_path / "mine.png")
    expect(page.locator("#ae-again-stage .ae-verdict")).to_have_text("The same picture, to the pixel.")
    page.goto(address)
    page.get_by_role("tab", name="Draw again").click()
    page.locator("#ae-drop input[type=file]").set_input_files(tmp_path / "mine.png")
    page.locator("#ae-use").click()
    expect(page.get_by_label("First seed")).to_have_value("5")


def test_a_bad_prompt_is_told_in_a_sentence(page: Page, address: str) -> None:
    _open(page, address)
    page.locator("#ae-prompt textarea").fill("a [cat and a frog")
    page.locator("#ae-draw").click()
    expect(page.get_by_role("alert")).to_contain_text("Unbalanced brackets")
    page.locator("#ae-prompt textarea").fill("a cat and a frog")
    assert len(_draw(page)) == 2


def test_two_visitors_at_once(browser: Browser, address: str) -> None:
    prompts = ["a cat and a frog", "a horse and a bird"]
    pages = [_open(_visitor(browser).new_page(), address, prompt=prompt) for prompt in prompts]
    for page in pages:
        page.locator("#ae-draw").click()
    for page, prompt in zip(pages, prompts, strict=True):
        expect(page.locator("#ae-closer")).to_be_visible()
        expect(page.locator("#ae-stage h3")).to_have_text(prompt)
        page.context.close()


def test_what_a_link_says_is_shown_and_not_run(page: Page, address: str) -> None:
    bad = "a cat ${window.ran = 1} {{x}} <img src=x onerror=window.ran=1>"
    _open(page, address, prompt=bad, subject="-cat=0.25")
    expect(page.locator("#ae-prompt textarea")).to_have_value(bad)
    expect(page.locator(".ae-subjects output").first).to_have_text("at most 25 %")
    _draw(page)
    expect(page.locator("#ae-stage h3")).to_have_text(bad)
    assert page.evaluate("window.ran") is None


def test_the_bundled_model_opens_with_what_it_is_and_tells_what_came(browser: Browser) -> None:
    from attend_excite.app.page import serving

    with serving(["stickers"]) as served:
        page = _visitor(browser).new_page()
        page.goto(served.local_url)
        expect(page.locator(".ae-about")).to_contain_text("24 subjects and 11 colours")
        # A plain picture of the opening lacks a subject: that is how it is chosen.
        expect(page.locator("#ae-stage figure").locator("[data-fits=no]")).not_to_have_count(0)
        _open(page, served.local_url, prompt="a cat and a wombat", steps=2, pictures=2, best=1)
        expect(_chip(page, "wom|bat")).to_have_attribute("data-unread", "")
        expect(page.locator("#ae-words .ae-note")).to_contain_text("never read “wombat”")
        assert len(_draw(page)) == 2
        expect(page.locator("#ae-stage .ae-tally")).to_contain_text("shows the most of the seeds 1 to 2")
        expect(page.locator("#ae-stage .ae-shows").last).to_have_text(re.compile("cat.[✓✗] *wombat.\\?"))
        page.locator("#ae-stage .ae-enlarge").last.click()
        expect(page.get_by_role("link", name="Save the PNG")).to_be_visible()
        page.context.close()


def test_an_example_brings_its_own_words(page: Page, address: str) -> None:
    _open(page, address)
    _chip(page, "a").first.click()
    expect(page.locator(".ae-subjects li")).to_have_count(3)
    page.locator("#ae-examples").get_by_text("a horse and a dog").click()
    expect(page.locator("#ae-prompt textarea")).to_have_value("a horse and a dog")
    expect(page.locator(".ae-subjects b")).to_have_text(["horse", "dog"])


def test_draw_waits_until_the_address_has_been_read(page: Page, address: str) -> None:
    expect.set_options(timeout=PATIENCE)
    page.route("**/run/predict*", lambda route: (page.wait_for_timeout(700), route.continue_()))
    page.goto(f"{address}?prompt=a+horse+and+a+bird&steps=2&recipe=no-refinement")
    page.locator("#ae-draw").click()
    page.unroute_all(behavior="ignoreErrors")
    expect(page.locator("#ae-closer")).to_be_visible()
    expect(page.locator("#ae-stage h3")).to_have_text("a horse and a bird")


def test_two_tabs_remember_for_each_other_and_bring_pictures_back(browser: Browser, address: str) -> None:
    visitor = _visitor(browser)
    prompts = ["a cat and a frog", "a horse and a bird"]
    one, other = (_open(visitor.new_page(), address, prompt=prompt, steps=2) for prompt in prompts)
    first = _draw(one)
    _draw(other)
    for page in (one, other):
        page.get_by_role("tab", name="History").click()
        expect(page.locator("#ae-history b")).to_have_text(prompts[::-1])
    other.locator("#ae-history button").last.click()
    expect(other.locator("#ae-stage h3")).to_have_text(prompts[0])
    expect(other.locator("#ae-prompt textarea")).to_have_value(prompts[0])
    urls = other.locator("#ae-stage a").evaluate_all("links => links.map((link) => link.href)")
    assert [other.request.get(url).body() for url in urls] == first
    visitor.close()


def test_stop_keeps_what_is_there_and_shows_only_while_something_runs(page: Page, address: str) -> None:
    _open(page, address, steps=100, pictures=8)
    expect(page.locator("#ae-stop")).to_be_hidden()
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#ae-draw").click()
    expect(page.locator("#ae-stage img")).not_to_have_count(0)
    expect(page.locator("#ae-stop")).to_be_in_viewport()
    page.locator("#ae-stop").click()
    expect(page.locator("#ae-stage")).to_contain_text(re.compile("Stopped at step [0-9]+ of 200"))
    expect(page.locator("#ae-stage img")).not_to_have_count(0)
    expect(page.locator("#ae-stop")).to_be_hidden()


def test_all_methods_stand_in_a_grid(page: Page, address: str) -> None:
    _open(page, address, steps=2)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#ae-compare").click()
    expect(page.locator("#ae-compare-stage a")).to_have_count(5)
    page.get_by_role("tab", name="History").click()
    expect(page.locator("#ae-history button").first).to_have_text(re.compile("5 methods · 2 steps"))
    page.wait_for_url("**steps=2*")

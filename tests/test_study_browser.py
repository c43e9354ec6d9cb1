"""The study in a real browser, as a respondent has it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from attend_excite.study import database
from attend_excite.study.server import create_app
from attend_excite.study.votes import Vote

CHROMIUM = Path("/usr/bin/chromium")
expect.set_options(timeout=30_000)

pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"there is no {CHROMIUM}")


@dataclass(frozen=True)
class Site:
    """A study that is being served."""

    address: str
    url: str

    def votes(self, page: Page) -> list[Vote]:
        """Those of the respondent who looks at this page."""
        respondent = page.locator("footer code").inner_text()
        return [vote for vote in database.votes(self.url) if vote.respondent == respondent]


@pytest.fixture(scope="module")
def site(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    url = f"sqlite:///{tmp_path_factory.mktemp('votes')}/votes.sqlite"
    config = uvicorn.Config(create_app(study_folder, url), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Site(f"http://127.0.0.1:{port}", url)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, site: Site) -> Iterator[BrowserContext]:
    """A respondent's browser."""
    context = browser.new_context(base_url=site.address)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """The first page of a respondent who has just agreed."""
    page = context.new_page()
    page.goto("/")
    page.get_by_role("button", name="I agree").click()
    at(page, 1)
    return page


def at(page: Page, number: int) -> None:
    """Wait until the browser shows a page, and long enough that a click is meant for it."""
    expect(page).to_have_url(re.compile(rf"/page/{number}$"))
    # The page's script is deferred: what is shown may be there before it has run.
    page.wait_for_load_state("domcontentloaded")
    page.wait_for_function("() => performance.now() - LOADED > HASTE")


def choose(page: Page, number: int) -> None:
    page.get_by_role("button", name=f"Set {number}").click()


def test_a_whole_session(page: Page, site: Site) -> None:
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    choose(page, 1)
    at(page, 2)
    page.keyboard.press("2")
    at(page, 3)
    page.keyboard.press("0")
    at(page, 4)
    page.keyboard.press("ArrowLeft")
    at(page, 3)
    expect(page.get_by_role("button", name="None is better")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("link", name="Next").click()
    at(page, 4)
    page.get_by_role("link", name="Skip").click()
    for number in (5, 6):
        at(page, number)
        choose(page, 3)
    expect(page.get_by_role("heading")).to_have_text("5 of 6 answered")
    expect(page.get_by_role("button", name="Hand in")).to_have_count(0)
    page.get_by_role("link", name="Page 4, no answer").click()
    at(page, 4)
    loaded = "images => images.every(image => image.complete && image.naturalWidth == 64)"
    assert page.locator("img").evaluate_all(loaded)
    choose(page, 2)  # nothing is left, and so back to the overview
    page.get_by_role("button", name="Hand in").click()
    expect(page.get_by_role("heading")).to_have_text("Thank you")
    votes = site.votes(page)
    chosen = [vote.choice and vote.shown.index(vote.choice) + 1 for vote in votes]
    assert chosen == [1, 2, None, 2, 3, 3]
    assert errors == []


def test_the_back_button_shows_the_choice_and_changes_it(page: Page, site: Site) -> None:
    choose(page, 1)
    at(page, 2)
    page.go_back()
    at(page, 1)
    expect(page.get_by_role("button", name="Set 1")).to_have_attribute("aria-pressed", "true")
    choose(page, 3)
    at(page, 2)
    (vote,) = site.votes(page)
    assert vote.choice == vote.shown[2]


def test_a_double_click_is_one_vote(page: Page, site: Site) -> None:
    page.get_by_role("button", name="Set 2").dblclick()
    at(page, 2)
    page.keyboard.down("1")
    for _ in range(5):  # Held down, a key repeats.
        page.keyboard.down("1")
    page.keyboard.up("1")
    at(page, 3)
    assert [vote.choice for vote in site.votes(page)] == [
        vote.shown[choice] for vote, choice in zip(site.votes(page), (1, 0), strict=True)
    ]


def test_an_answer_that_does_not_come_may_be_sent_again(page: Page, site: Site) -> None:
    page.evaluate("document.querySelector('form').addEventListener('submit', e => e.preventDefault())")
    choose(page, 1)  # As if the connection were stopped: the page stays.
    page.wait_for_function("() => sent")
    page.wait_for_function("() => !sent")
    page.reload()
    at(page, 1)
    choose(page, 2)
    at(page, 2)
    (vote,) = site.votes(page)
    assert vote.choice == vote.shown[1]


def test_two_tabs_are_one_respondent(page: Page, site: Site, context: BrowserContext) -> None:
    other = context.new_page()
    other.goto("/page/1")
    at(other, 1)
    choose(page, 1)
    at(page, 2)
    choose(other, 2)
    at(other, 2)
    (vote,) = site.votes(page)
    assert vote.choice == vote.shown[1]
    for number in range(2, 7):
        at(page, number)
        choose(page, 1)
    page.get_by_role("button", name="Hand in").click()
    expect(page.get_by_role("heading")).to_have_text("Thank you")
    choose(other, 3)
    expect(other.get_by_text("handed in already")).to_be_visible()
    assert len(site.votes(page)) == 6
    assert site.votes(page)[1].choice == site.votes(page)[1].shown[0]


def test_a_closed_browser_goes_on(page: Page, site: Site, context: BrowserContext, browser: Browser) -> None:
    choose(page, 2)
    at(page, 2)
    kept = context.storage_state()
    context.close()
    again = browser.new_context(base_url=site.address, storage_state=kept).new_page()
    again.goto("/")
    expect(again.get_by_text("1 of your 6 answers are saved")).to_be_visible()
    again.get_by_role("button", name="Go on").click()
    at(again, 2)
    (vote,) = site.votes(again)
    assert vote.choice == vote.shown[1]
    again.context.close()


def test_forged_votes_are_refused(page: Page, site: Site, context: BrowserContext, browser: Browser) -> None:
    page.get_by_role("button", name="Set 1").evaluate("button => { button.value = 'ours'; button.click(); }")
    expect(page.get_by_text("There is no such set")).to_be_visible()

    # Another respondent's form, sent with one's own cookie.
    stranger = browser.new_context(base_url=site.address).new_page()
    stranger.goto("/")
    stranger.get_by_role("button", name="I agree").click()
    token = stranger.locator("input[name=token]").get_attribute("value")
    page.goto("/page/1")
    at(page, 1)
    page.locator("input[name=token]").evaluate("(input, token) => { input.value = token; }", token)
    choose(page, 1)
    expect(page.get_by_text("not one that this site gave to this browser")).to_be_visible()

    # One's own form, sent from elsewhere: neither a cookie nor the answer passes.
    page.goto("/page/1")
    own = page.locator("input[name=token]").get_attribute("value")
    elsewhere = context.new_page()
    elsewhere.goto("data:text/html,<form method=post><input name=token><input name=choice value=1></form>")
    elsewhere.locator("form").evaluate(
        "(form, [address, token]) => { form.action = address; form.token.value = token; form.submit(); }",
        [f"{site.address}/page/1", own],
    )
    expect(elsewhere.get_by_text("sent from another site")).to_be_visible()
    assert site.votes(page) == []
    assert page.evaluate("document.cookie") == ""
    stranger.context.close()


def test_a_phone_without_scripts_will_do(browser: Browser, site: Site) -> None:
    phone = browser.new_context(
        base_url=site.address, viewport={"width": 360, "height": 740}, java_script_enabled=False
    )
    page = phone.new_page()
    page.goto("/")
    page.get_by_role("button", name="I agree").click()
    for number in (1, 2):
        expect(page).to_have_url(re.compile(f"/page/{number}$"))
        box = page.get_by_role("button", name="Set 3").bounding_box()
        assert box is not None
        assert 0 <= box["x"] < box["x"] + box["width"] <= 360
        choose(page, 3)
    expect(page).to_have_url(re.compile("/page/3$"))
    assert [vote.choice for vote in site.votes(page)] == [vote.shown[2] for vote in site.votes(page)]
    phone.close()

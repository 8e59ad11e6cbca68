"""The page in headless Chromium with a made-up microphone and camera, against a server with nano."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_server import Served, serve

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tmlc[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: run `make browser`")
FLAGS = [
    "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--disable-gpu",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip
OVERLAPS = """() => {
  const texts = [...document.querySelectorAll('h1,h2,p,dt,dd,label,button,li,span')].filter(
    e => e.offsetParent && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  const boxes = texts.map(e => { const r = document.createRange(); r.selectNodeContents(e);
                                 return [e, r.getBoundingClientRect()]; });
  const found = [];
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    if (a.contains(b) || b.contains(a)) return;
    const list = document.getElementById('captions');
    if (list.contains(a) !== list.contains(b) && (list.contains(a) || list.contains(b))) return;  // it scrolls
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
      found.push([a.textContent, b.textContent]);
  }));
  return found;
}"""
PAINTED = """() => {
  const c = document.getElementById('strip');
  const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  let first = c.width, last = -1, count = 0;
  for (let i = 3; i < data.length; i += 4) if (data[i]) {
    const x = ((i - 3) / 4) % c.width; count++; first = Math.min(first, x); last = Math.max(last, x);
  }
  return {count, first, last, width: c.width};
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(nano: Any) -> Iterator[Served]:
    with serve(nano, sessions=4) as served:
        yield served


@pytest.fixture
def visit(browser: Any, server: Served) -> Iterator[Callable[..., Any]]:
    """Opens the page at a size; at the end nothing may have gone wrong in it, and nothing was asked of another host."""
    opened, faults, hosts = [], list[str](), set[str]()

    def open_page(width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, permissions=["microphone", "camera"]
        )
        page = context.new_page()
        page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: hosts.add(r.url.split("/")[2]) if not r.url.startswith("data:") else None)
        page.goto(server.url.removesuffix("/v1") + "/")
        wait(page, "document.getElementById('model').textContent === 'nano'")
        opened.append(context)
        return page

    yield open_page
    for context in opened:
        context.close()
    assert not faults
    assert hosts == {server.url.split("/")[2]}


def wait(page: Any, condition: str, seconds: float = 15.0) -> None:
    """Until an expression holds in the page. (Playwright's own waiting evaluates strings, which the page forbids.)"""
    limit = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < limit, f"{condition}: {page.text_content('#status')}"
        page.wait_for_timeout(50)


def start(page: Any, ticks: int = 3, camera: bool = False) -> None:
    if camera:
        page.check("#use-camera")
    page.click("#start")
    wait(page, f"Number(document.getElementById('count').textContent) >= {ticks}", 30.0)


def ended(page: Any) -> None:
    page.click("#start")
    wait(page, "document.getElementById('status').textContent === 'ended'")


def test_a_conversation_from_a_browser(visit: Callable[..., Any], server: Served) -> None:
    before = server.scheduler.stats()
    page = visit()
    start(page, ticks=30, camera=True)
    page.fill("#text", "hello")
    page.click("#send")
    assert page.locator("#captions", has_text="hello").count() == 1
    (session,) = server.hub.sessions._by_token.values()
    assert page.locator("#captions .who", has_text="model").count() >= 1  # it said something, in letters
    assert page.text_content("#status") == "live" and page.text_content("#step").endswith(" ms")
    context = session.beside._transcript.context("")
    assert any(line.speaker == "user" and "hello" in line.text for line in context.lines)
    assert context.frames and context.frames[-1].pixels.std() > 0  # the camera's picture, not an empty one
    counters = session.seat.counters()
    # A real microphone runs on its own clock: only what the start took is missing, and nothing was too much.
    assert counters.ticks >= 30 and counters.missing < 16000 and counters.dropped_overflow == 0
    ended(page)
    after = server.scheduler.stats()
    assert after.ended.get("closed", 0) == before.ended.get("closed", 0) + 1
    assert server.scheduler.engine.capacity().free == server.scheduler.engine.capacity().sessions


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_it_reads_well_at_any_width(visit: Callable[..., Any], width: int, scheme: str) -> None:
    page = visit(width, scheme)
    start(page, ticks=12, camera=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == []
    painted = page.evaluate(PAINTED)
    assert painted["count"] > 100 and 0 <= painted["first"] <= painted["last"] < painted["width"]
    ended(page)


def test_a_cut_connection_goes_on_with_the_same_session(visit: Callable[..., Any], server: Served) -> None:
    page = visit()
    start(page)
    (session,) = server.hub.sessions._by_token.values()
    assert session.connection is not None
    server.hub.sessions.loop.call_soon_threadsafe(session.connection.request.transport.abort)  # type: ignore[attr-defined]
    wait(page, "document.getElementById('status').dataset.state === 'busy'")
    wait(page, "document.getElementById('status').textContent === 'live'")
    reached = int(page.text_content("#count"))
    wait(page, f"Number(document.getElementById('count').textContent) > {reached + 2}")
    assert [one.id for one in server.hub.sessions._by_token.values()] == [session.id]
    ended(page)


def test_muting_silences_the_microphone(visit: Callable[..., Any], server: Served) -> None:
    page = visit()
    start(page, ticks=10)
    (session,) = server.hub.sessions._by_token.values()

    def until(speaking: bool) -> bool:
        limit = time.monotonic() + 8
        while session.seat.user_speaking != speaking and time.monotonic() < limit:
            page.wait_for_timeout(50)
        return session.seat.user_speaking is speaking

    assert until(True)  # the made-up microphone beeps once a second
    page.click("#mute")
    page.wait_for_timeout(1000)
    assert page.get_attribute("#mute", "aria-pressed") == "true"
    heard = []
    for _ in range(30):
        heard.append(session.seat.user_speaking)
        page.wait_for_timeout(100)
    assert not any(heard)
    ended(page)

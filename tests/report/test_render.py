"""The report in headless Chromium, wide and narrow, light and dark: it is looked at, and the look itself is tested.

What is not slow looks at the profile of a real package; the rest at made-up ones of every kind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_profile import bare_profile, full_profile

from tmlc.cli.main import cli
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig, read_preset
from tmlc.report.advice import add_advice
from tmlc.report.html.page import html_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tmlc[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: run `make browser`")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
LOOK = """() => {
  const faults = [];
  const shown = (e) => e.getClientRects().length > 0;
  const name = (e) => `${e.closest('section')?.id ?? 'head'} ${e.closest('svg')?.ariaLabel?.slice(0, 30) ?? e.tagName}`;
  for (const svg of [...document.querySelectorAll('svg.plot')].filter(shown)) {
    const frames = [...svg.querySelectorAll('.frame')].map(f => f.getBoundingClientRect());
    const marks = [...svg.querySelectorAll('.mark')];
    if (!marks.length) faults.push(`no marks: ${name(svg)}`);
    for (const mark of marks) {
      const m = mark.getBoundingClientRect();
      if (!frames.some(f => m.left >= f.left - 1.5 && m.right <= f.right + 1.5
                         && m.top >= f.top - 1.5 && m.bottom <= f.bottom + 1.5))
        faults.push(`mark outside of its frame: ${name(mark)} ${mark.getAttribute('class')}`);
    }
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    for (const text of svg.querySelectorAll('text')) {
      const t = text.getBoundingClientRect();
      if (t.left < box.left - 1 || t.right > box.right + 1 || t.top < box.top - 2 || t.bottom > box.bottom + 2)
        faults.push(`text cut off: ${text.textContent}`);
      if (parseFloat(getComputedStyle(text).fontSize) * scale < 11) faults.push(`text too small: ${text.textContent}`);
    }
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || ['SCRIPT', 'STYLE', 'title'].includes(parent.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const lines = parent.tagName === 'text' ? [parent.getBoundingClientRect()] : [...range.getClientRects()];
    for (const r of lines.filter(r => r.width > 0)) texts.push({node, parent, r, scroll: parent.closest('.scroll')});
  }
  texts.sort((a, b) => a.r.top - b.r.top);
  texts.forEach((a, i) => {
    for (let k = i + 1; k < texts.length && texts[k].r.top < a.r.bottom - 3; k++) {
      const b = texts[k];
      if (a.node !== b.node && a.scroll === b.scroll && a.r.left < b.r.right - 1 && b.r.left < a.r.right - 1)
        faults.push(`texts overlap: ${a.node.textContent} / ${b.node.textContent}`);
    }
    if (!a.scroll && a.r.right > innerWidth + 1) faults.push(`wider than the window: ${a.node.textContent}`);
  });
  for (const box of [...document.querySelectorAll('.scroll')].filter(shown))
    if ((innerWidth >= 1280 || box.querySelector('.pairs')) && box.scrollWidth > box.clientWidth)
      faults.push(`table cut off: ${box.ariaLabel}`);
  if (document.documentElement.scrollWidth > innerWidth) faults.push('the page scrolls sideways');
  const part = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => { const [r, g, b] = rgb(text).map(part); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
                             return (x + 0.05) / (y + 0.05); };
  const ground = getComputedStyle(document.body).backgroundColor;
  const frame = getComputedStyle(document.querySelector('.frame')).fill;
  for (const {node, parent} of texts) {
    const inside = parent.tagName === 'text', style = getComputedStyle(parent);
    for (const under of inside ? [ground, frame] : [ground])
      if (ratio(inside ? style.fill : style.color, under) < 4.5) faults.push(`contrast: ${node.textContent}`);
  }
  return [...new Set(faults)];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Callable[..., list[str]]:
    """Opens a report from its file and says what is wrong with how it looks, and what it asked for or complained of."""

    def open_report(text: str, width: int, scheme: str, scripts: bool = True) -> list[str]:
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
        )
        page, faults = context.new_page(), list[str]()
        page.on("console", lambda m: faults.append(f"console: {m.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("request", lambda r: faults.append(f"request: {r.url}") if r.url != path.as_uri() else None)
        page.goto(path.as_uri())
        try:
            return [*faults, *page.evaluate(LOOK)]
        finally:
            context.close()

    return open_report


def report(view: dict[str, Any]) -> str:
    add_advice(view)
    return html_report(view)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a session that a real engine ran: nano made smaller, all methods."""
    folder = tmp_path_factory.mktemp("real")
    config = read_preset("nano")["config"]
    config["name"] = "tiny"
    config["text_config"].update(
        hidden_size=32, num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"],
        mlp_layer_types=["dense", "sparse"], num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        swa_num_attention_heads=2, swa_num_key_value_heads=1, swa_head_dim=16, intermediate_size=64,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config["speech_config"].update(flow_width=32, flow_layers=1, flow_steps=2, vocoder_width=32, vocoder_layers=1)
    create_checkpoint(InteractionConfig.from_dict(config), 0, folder / "tiny")
    for given in (
        ("compile", folder / "tiny", "-o", folder / "tiny.tmlc", "--json"),
        ("profile", folder / "tiny.tmlc", "--seconds", "4", "--startup-runs", "0", "-o", folder / "report",
         "--kernels-every", "4", "--budget", "60s"),
    ):  # fmt: skip
        done = CliRunner().invoke(cli, [str(a) for a in given])
        assert done.exit_code == 0, done.output
    view = json.loads((folder / "report.json").read_text())
    assert view["kernels"]["calls"] and view["ceilings"] and view["memory_map"]
    return (folder / "report.html").read_text()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_report_of_a_real_session_reads(
    look: Callable[..., list[str]], real: str, width: int, scheme: str
) -> None:
    assert look(real, width, scheme) == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark"), (1280, "dark"), (400, "light")])
def test_the_report_reads_wide_and_narrow_light_and_dark(
    look: Callable[..., list[str]], width: int, scheme: str
) -> None:
    assert look(report(full_profile()), width, scheme) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda: full_profile(slow=160.0, scale=5.0), id="over its budget"),
        pytest.param(lambda: full_profile(slow=400.0), id="slow ticks"),
        pytest.param(lambda: bare_profile(count=2), id="two ticks"),
        pytest.param(lambda: bare_profile(count=4000, scale=0.001), id="fast and long"),
        pytest.param(lambda: full_profile(budget_ms=265.0), id="tight"),
    ],
)
def test_every_kind_of_profile_reads(look: Callable[..., list[str]], view: Callable[[], dict[str, Any]]) -> None:
    text = report(view())
    assert look(text, 400, "light") == []
    assert look(text, 1280, "light") == []


@pytest.mark.slow
def test_the_widths_between_read_too(look: Callable[..., list[str]]) -> None:
    text = report(full_profile())
    assert [fault for width in (360, 640, 899, 900, 1024) for fault in look(text, width, "light")] == []


@pytest.mark.slow
def test_tables_sort_by_a_click_and_need_no_script_to_be_read(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report(full_profile()), encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    column = "[...document.querySelector('#kernels table').tBodies[0].rows].map(r => Number(r.cells[5].dataset.v))"
    for order in (True, False):
        page.locator("#kernels table").first.locator("th button").nth(5).click()
        values = page.evaluate(column)
        assert values == sorted(values, reverse=order) and len(values) == 7
    context.close()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(path.as_uri())
    assert plain.locator("#kernels table").first.locator("tbody tr").count() == 7
    assert plain.locator("h1").inner_text().startswith("It answers in time")
    plain.context.close()


def found_in(faults: list[str], what: str) -> bool:
    return any(what in fault for fault in faults)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("</text>", '</text><text x="100" y="100">on</text><text x="104" y="102">top</text>', "texts overlap"),
        (".pairs td {", ".none td {", "table cut off: Machine and settings"),
    ],
)
def test_a_broken_report_of_a_real_session_is_found(
    look: Callable[..., list[str]], real: str, old: str, new: str, found: str
) -> None:
    assert old in real
    faults = look(real.replace(old, new), 400, "light")
    assert found_in(faults, found), faults


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('<circle cx="', '<circle transform="translate(0 900)" cx="', "mark outside of its frame"),
        ('class="mark', 'class="', "no marks"),
        ("</text>", '</text><text x="100" y="100">on</text><text x="104" y="102">top</text>', "texts overlap"),
        ("<main>", '<main><p style="width:2000px;max-width:none">wide</p>', "sideways"),
        ("--soft: #585f6b", "--soft: #c8c8c8", "contrast"),
        ('font-size="12"', 'font-size="8"', "text too small"),
        ("<main>", '<main><img src="https://example.invalid/a.png" alt="">', "console"),
        ("<main>", "<main><script>document.title = 'run'</script>", "console"),
    ],
)
def test_a_broken_report_is_found(look: Callable[..., list[str]], old: str, new: str, found: str) -> None:
    text = report(full_profile())
    assert old in text
    faults = look(text.replace(old, new), 400, "light")
    assert found_in(faults, found), faults

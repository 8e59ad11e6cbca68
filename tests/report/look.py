"""Opens a report in headless Chromium and says what is wrong with how it looks: the fixtures `browser` and `look`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tmlc[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: run `make browser`")
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


@pytest.fixture(scope="module", name="browser")
def a_browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(name="look")
def a_look(browser: Any, tmp_path: Path) -> Callable[..., list[str]]:
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

"""Made-up reports of every kind in headless Chromium, and the look itself on broken ones. That of a real session is
looked at in tests/cli.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from look import a_browser, a_look, needs_browser  # noqa: F401 (fixtures)
from made_profile import bare_profile, full_profile

from tmlc.report.advice import add_advice
from tmlc.report.html.page import html_report

pytestmark = [needs_browser, pytest.mark.slow]


def report(view: dict[str, Any]) -> str:
    add_advice(view)
    return html_report(view)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark"), (1280, "dark"), (400, "light")])
def test_the_report_reads_wide_and_narrow_light_and_dark(
    look: Callable[..., list[str]], width: int, scheme: str
) -> None:
    assert look(report(full_profile()), width, scheme) == []


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


def test_the_widths_between_read_too(look: Callable[..., list[str]]) -> None:
    text = report(full_profile())
    assert [fault for width in (360, 640, 899, 900, 1024) for fault in look(text, width, "light")] == []


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
    assert any(found in fault for fault in faults), faults

"""Gates as JUnit XML, in the form that CI systems read: testsuites, testsuite, testcase with failure or skipped."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from xml.etree import ElementTree

from tmlc.report.gates import Case

NO_LIMIT = "no limit was given"


def junit_text(suite: str, cases: Sequence[Case]) -> str:
    """One test case a gate. A gate without a limit is a skipped case: it can fail nothing, and its figure is shown."""
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.passed is False for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.passed is None for case in cases)),
    }
    root = ElementTree.Element("testsuites", {"name": "tmlc profile", **counts})
    group = ElementTree.SubElement(root, "testsuite", {"name": _clean(suite), **counts, "time": "0"})
    for case in cases:
        one = ElementTree.SubElement(
            group, "testcase", {"classname": "tmlc.profile", "name": _clean(case.name), "time": "0"}
        )
        if case.passed is False:
            ElementTree.SubElement(one, "failure", {"message": _clean(case.says), "type": "limit"}).text = _clean(
                case.says
            )
        elif case.passed is None:
            ElementTree.SubElement(one, "skipped", {"message": f"{NO_LIMIT}: {_clean(case.says)}"})
        else:
            ElementTree.SubElement(one, "system-out").text = _clean(case.says)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """Without characters that XML 1.0 has no form for."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Cn") else c for c in text)

"""`tmlc/versions.py`."""

import pytest

from tmlc.versions import dotted, release


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("3.7.1", (3, 7, 1)), ("3.10.0+git1a", (3, 10, 0)), ("1.24rc1", (1, 24)), ("5", (5,)), ("dev", ()), ("", ())],
)
def test_a_release_is_the_numbers_that_a_version_begins_with(text, numbers):
    assert release(text) == numbers


def test_releases_compare_as_versions_do():
    order = ["not a version", "3.6", "3.6.2", "3.9.0", "3.10.0", "4"]
    assert sorted(set(order), key=release) == order
    assert dotted(release("3.10.0.dev1")) == "3.10.0"

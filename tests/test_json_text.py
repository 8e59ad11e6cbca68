"""JSON that is printed: the same value, readable, and nothing that a terminal obeys."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmlc import json_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES, st.sampled_from([None, 2]))
def test_reads_back_as_the_same_value_and_is_printable(value, indent):
    text = json_text.dumps(value, indent=indent)
    assert json.loads(text) == value
    assert text.replace("\n", "").isprintable()


def test_escapes_every_character_that_is_not_printable():
    for code in range(sys.maxunicode + 1):
        if not chr(code).isprintable():
            text = json_text.dumps({chr(code): 1})
            assert text.isascii() and json.loads(text) == {chr(code): 1}, hex(code)


def test_leaves_letters_of_every_script_as_they_are():
    assert json_text.dumps(["Grüße", "こんにちは", "🙂"]) == '["Grüße", "こんにちは", "🙂"]'


def test_refuses_what_is_no_json():
    with pytest.raises(ValueError):
        json_text.dumps(float("nan"), allow_nan=False)

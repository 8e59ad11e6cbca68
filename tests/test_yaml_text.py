"""`tmlc/yaml_text.py`, and that what reads a YAML file of a user tells all that can be wrong with one."""

import pytest

from tmlc.bench.dialogues import read_folder
from tmlc.errors import TmlcError
from tmlc.kernels.triton.tuning import Tiles
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.report.scenario.case import read_case
from tmlc.runtimes.background.config import read_settings as read_background
from tmlc.runtimes.gateway.settings import read_settings as read_serving
from tmlc.runtimes.media.timed_text import read_timed_text
from tmlc.yaml_text import YamlFault, compose_yaml, parse_yaml

WRONG = {
    "a date that is none": ("2026-13-45", "'2026-13-45' is not a value of the type timestamp", 2),
    "a wrong tag": ("!!bool maybe", "'maybe' is not a value of the type bool", 2),
    "a time of no form": ("!!timestamp foo", "'foo' is not a value of the type timestamp", 2),
    "no number": ("!!int x", "type int", 2),
    "more digits than Python reads": ("1" * 5000, "type int", 2),
    "an object of Python": ("!!python/object/apply:os.getcwd []", "could not determine a constructor", 2),
    "an anchor that is nowhere": ("*no", "undefined alias", 2),
    "a key that cannot be one": ("{[a]: b}", "unhashable key", 2),
    "too deep": ("[" * 5000, "nested too deeply", None),
    "no character": ("\0", "a character that cannot stand there", None),
    "not closed": ("[", "expected the node content", 3),
}
FORMS = {
    "case": "name: a\nseconds: {}\n",
    "pipeline": "- pass: canonicalize.dead_code\n- pass: {}\n",
    "labels": "- {{start: 0, end: 1}}\n- {{start: {}, end: 3}}\n",
    "serving": "port: 0\nsessions: {}\n",
    "background": "model: {{}}\nlimits: {}\n",
    "tiles": "[]\n#\n- {{op: {}}}\n",
    "timed text": "- {{at: 0, text: a}}\n- {{at: {}, text: b}}\n",
}
READERS = {
    "case": read_case,
    "pipeline": load_pipeline,
    "labels": lambda path: read_folder(path.parent, 16000),
    "serving": lambda path: read_serving(path, {}),
    "background": read_background,
    "tiles": Tiles.read,
    "timed text": read_timed_text,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_whatever_is_wrong_with_a_text_is_one_line_that_says_where(wrong):
    text, what, line = WRONG[wrong]
    with pytest.raises(YamlFault) as caught:
        parse_yaml(f"a: 1\nb: {text}\n")
    assert what in caught.value.what and "\n" not in str(caught.value)
    assert caught.value.line == line and ("line" in caught.value.within("x.yaml")) == (line is not None)


def test_bytes_that_are_not_utf_8_and_two_documents_are_told():
    with pytest.raises(YamlFault, match="not UTF-8"):
        parse_yaml(b"a: \xff")
    assert parse_yaml(b"\xef\xbb\xbfa: 1") == {"a": 1}
    with pytest.raises(YamlFault, match=r"line 2: .*document"):
        parse_yaml("--- a\n--- b")


def test_values_and_nodes_of_a_sound_text():
    assert parse_yaml("a: [1, 2.5, yes]\nb: 2026-11-30\n")["a"] == [1, 2.5, True] and parse_yaml("") is None
    assert compose_yaml("a: 1").start_mark.line == 0 and compose_yaml("") is None


@pytest.mark.parametrize("text", [*(text for text, *_ in WRONG.values()), "&a [*a]"], ids=[*WRONG, "itself"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_a_users_yaml_tells_what_is_wrong_with_it(tmp_path, reader, text):
    file = tmp_path / "file.yaml"
    file.write_text(FORMS[reader].format(text), encoding="utf-8")
    if reader == "labels":
        import numpy as np
        import soundfile

        soundfile.write(tmp_path / "file.wav", np.zeros(16000 * 9, np.float32), 16000)
    with pytest.raises(TmlcError) as caught:
        READERS[reader](file)
    assert "\n" not in caught.value.what and "file.yaml" in caught.value.where and caught.value.fix

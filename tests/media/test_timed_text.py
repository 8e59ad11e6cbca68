"""Timed text: what is accepted, and how everything else is refused."""

import pytest

from tmlc.errors import MediaError
from tmlc.runtimes.media.timed_text import TimedText, read_timed_text


def write(tmp_path, text):
    path = tmp_path / "typed.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_entries_come_back_in_order(tmp_path):
    path = write(
        tmp_path,
        '# a comment\n- {at: 0, text: "hi"}\n- at: 1.5\n  text: grüß dich\n- {at: 1.5, text: again}\n',
    )
    assert read_timed_text(path) == [
        TimedText(0.0, "hi"),
        TimedText(1.5, "grüß dich"),
        TimedText(1.5, "again"),
    ]


def test_an_empty_file_types_nothing(tmp_path):
    assert read_timed_text(write(tmp_path, "# nothing\n")) == []


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("at: 1\ntext: hi\n", "not a list", 1),
        ("- hi\n", "not a mapping", 1),
        ('- {at: 0, text: "a"}\n- {at: 1, txet: "b"}\n', "unknown key 'txet'", 2),
        ("- {at: 0}\n", "no 'text'", 1),
        ("- {text: a}\n", "no 'at'", 1),
        ("- {at: 0, at: 1, text: a}\n", "twice", 1),
        ("- {at: -1, text: a}\n", "not a number of seconds", 1),
        ("- {at: .nan, text: a}\n", "not a number of seconds", 1),
        ("- {at: .inf, text: a}\n", "not a number of seconds", 1),
        ("- {at: true, text: a}\n", "not a number of seconds", 1),
        (f"- {{at: 1{'0' * 400}, text: a}}\n", "not a number of seconds", 1),
        ('- {at: "1", text: a}\n', "not a number of seconds", 1),
        ("- {at: 1, text: yes}\n", "not a string", 1),
        ("- {at: 1, text: ''}\n", "not a string", 1),
        ("- {at: 1, text: [a]}\n", "not a string", 1),
        ("- {at: 2, text: a}\n- {at: 1, text: b}\n", "goes back", 2),
        ("- {at: 2, text: a\n", "not YAML", 2),
        ("- {at: !!python/object/apply:os.getcwd [], text: a}\n", "cannot be read", 1),
        ("- {[1]: 2}\n", "unknown key", 1),
    ],
)
def test_bad_text_is_refused_with_its_line(tmp_path, text, what, line):
    with pytest.raises(MediaError) as caught:
        read_timed_text(write(tmp_path, text))
    assert what in caught.value.what
    assert caught.value.where.endswith(f"line {line}")
    assert caught.value.fix


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(MediaError, match="no such"):
        read_timed_text(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MediaError, match="UTF-8"):
        read_timed_text(tmp_path / "binary.yaml")
    with pytest.raises(MediaError):
        read_timed_text(tmp_path)

"""The settings file: what it makes, what it refuses, and that no secret is in anything it says."""

import pytest

from tmlc.errors import UsageError
from tmlc.runtimes.background.config import check_settings, read_settings
from tmlc.runtimes.background.endpoint import EndpointModel
from tmlc.runtimes.background.policies import Policy
from tmlc.runtimes.background.rules import Trigger

WHOLE = """
model:
  {kind: endpoint, url: http://127.0.0.1:8000/v1, name: thinker, api: responses, key_env: THINKER_KEY, images: true}
instructions: Answer in one sentence.
tools:
  - {name: files, command: [python, server.py], env: [FILES_ROOT]}
  - {name: web, url: https://tools.example/mcp, key_env: TOOLS_KEY}
rules:
  - {every: 60 s, inject: "{time} have passed.", policy: silent, supersede: clock}
  - {when: silence_for 5 s, delegate: Suggest a topic., once: true}
limits: {live: 2, timeout: 30 s, progress_after: 5 s, spoken: false, policy: next_gap}
marks: {injection: "<|tool|>", end_of_injection: "<|end|>"}
"""
KEYS = {"THINKER_KEY": "sk-thinker", "TOOLS_KEY": "sk-tools", "FILES_ROOT": "here"}
MODEL = {"kind": "endpoint", "url": "http://127.0.0.1/v1", "name": "x"}


def test_a_whole_file_is_read_and_made(tmp_path):
    (tmp_path / "background.yaml").write_text(WHOLE)
    settings = read_settings(tmp_path / "background.yaml")
    background = settings.make(first_target="cpu", environ=KEYS)
    assert isinstance(background.model, EndpointModel)
    assert (background.limits.live, background.limits.timeout, background.limits.spoken) == (2, 30.0, False)
    assert background.limits.policy is Policy.NEXT_GAP and background.marks.injection == "<|tool|>"
    assert [rule.on for rule in background.rules] == [Trigger("every", 60_000), Trigger("when", 5000, "silence_for")]
    for secret in KEYS.values():
        assert secret not in repr(settings) + repr(background.model) + repr(vars(background.model._tools))


def test_an_empty_file_is_a_background_without_a_model(tmp_path):
    (tmp_path / "background.yaml").write_text("")
    assert read_settings(tmp_path / "background.yaml").make(first_target="cpu").model is None


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"modle": {}}, "modle"),
        ({"model": {"kind": "oracle"}}, "model"),
        ({"model": {"kind": "client"}}, "model"),
        ({"model": MODEL | {"api_key": "sk-secret"}}, "model.endpoint.api_key"),
        ({"model": {"kind": "sk-secret"}}, "model.kind"),
        ({"model": MODEL, "limits": {"timeout": "sk-secret"}}, "limits.timeout"),
        ({"model": MODEL, "rules": [{"when": "sk-secret", "inject": "x"}]}, "rules.0.when"),
        ({"model": MODEL | {"url": "ftp://x"}}, "url"),
        ({"model": MODEL | {"url": "https://me:sk-secret@x/v1"}}, "url"),
        ({"model": MODEL | {"url": "https://x/v1?key=sk-secret"}}, "url"),
        ({"model": MODEL | {"key_env": "sk-secret"}}, "key_env"),
        ({"model": MODEL | {"max_tokens": 0}}, "max_tokens"),
        ({"tools": [{"name": "a", "command": ["x"]}]}, "tools"),
        ({"model": MODEL, "tools": [{"name": "a"}]}, "tools.0"),
        ({"model": MODEL, "tools": [{"name": "a b", "command": ["x"]}]}, "tools.0.name"),
        ({"model": MODEL, "tools": [{"name": "a", "command": ["x"], "key_env": "K"}]}, "tools.0"),
        ({"rules": [{"every": "4", "inject": "x"}]}, "rules.0.every"),
        ({"rules": [{"every": "4 s", "inject": "x"}] * 65}, "rules"),
        ({"limits": {"live": 5}}, "limits.live"),
        ({"limits": {"timeout": "121 s"}}, "limits"),
        ({"limits": {"timeout": 120}}, "limits.timeout"),
        ([], "file"),
        ("text", "file"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_never_quoted(wrong, place):
    with pytest.raises(UsageError) as error:
        check_settings(wrong, "background.yaml")
    assert place in str(error.value) and "background.yaml" in str(error.value)
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize("text", ["model: [", "a: &a [*a]\n", "\x00", "!!python/object:os.system {}"])
def test_what_is_not_plain_yaml_is_refused(tmp_path, text):
    (tmp_path / "background.yaml").write_text(text)
    with pytest.raises(UsageError):
        read_settings(tmp_path / "background.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_settings(tmp_path / "none.yaml")


def test_a_key_must_be_there_and_never_goes_unencrypted_to_another_machine():
    settings = check_settings({"model": MODEL | {"key_env": "K"}}, "here")
    with pytest.raises(UsageError, match="K is not set"):
        settings.make(first_target="cpu", environ={})
    settings.make(first_target="cpu", environ={"K": "sk-secret"})  # this machine
    for url, good in [("http://thinker.example/v1", False), ("https://thinker.example/v1", True)]:
        settings = check_settings({"model": MODEL | {"key_env": "K", "url": url}}, "here")
        if good:
            settings.make(first_target="cpu", environ={"K": "sk-secret"})
            continue
        with pytest.raises(UsageError, match="unencrypted") as error:
            settings.make(first_target="cpu", environ={"K": "sk-secret"})
        assert "sk-secret" not in str(error.value)


def test_a_tools_variable_must_be_there():
    settings = check_settings({"model": MODEL, "tools": [{"name": "a", "command": ["x"], "env": ["GONE"]}]}, "here")
    with pytest.raises(UsageError, match="GONE"):
        settings.make(first_target="cpu", environ={})

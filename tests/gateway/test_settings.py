"""The settings of a server: a strict file, options over it, and what is refused because anybody could come in."""

import pytest

from tmlc.errors import UsageError
from tmlc.runtimes.gateway.settings import ServeSettings, check_exposure, is_loopback, read_settings


def read(folder, text: str, **options) -> ServeSettings:
    path = folder / "serve.yaml"
    path.write_text(text)
    return read_settings(path, options)


def test_without_a_file_everything_stays_on_this_machine_and_unwritten():
    settings = read_settings(None, {})
    assert is_loopback(settings.host) and is_loopback(settings.admin_host)
    assert settings.record is None and settings.snapshots is None and settings.trace is None
    check_exposure(settings)


def test_options_go_over_the_file(tmp_path):
    text = "port: 1234\nsessions: 3\naliases: [a, b]\ncaps: {sessions: 2}\n"
    settings = read(tmp_path, text, port=99, aliases=("c",))
    assert (settings.port, settings.sessions, settings.aliases) == (99, 3, ("c",))
    assert settings.caps.sessions == 2 and settings.caps.messages == 200.0


def test_an_empty_file_changes_nothing(tmp_path):
    assert read(tmp_path, "# nothing\n") == read_settings(None, {})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("prot: 8000", "prot: "),
        ("caps: {session: 3}", "caps.session: "),
        ("port: many", "port: "),
        ("port: 65536", "port: "),
        ("sessions: 0", "sessions: "),
        ("sessions: [1]", "sessions: "),
        ("pin: perhaps", "pin: "),
        ("caps: 3", "caps: "),
        ("caps: {bytes: 10}", "caps.bytes: "),
        ("caps: {image_bytes: 99999999999}", "caps.image_bytes: "),
        ("drain: -1", "drain: "),
        ("certificate: a.pem", "both certificate and private_key"),
        ("origins: [app.example]", "an origin is"),
        ("origins: ['https://app.example/path']", "an origin is"),
        ("trace: somewhere", "spans go to a URL"),
        ("- a\n- b", "no mapping"),
        ("a: [", "not YAML"),
        ("a: &a [*a, *a]\nb: !!python/object/apply:os.getcwd []", "not YAML"),
        ("[" * 50_000, "not YAML"),
        ("#" * (1 << 21), "longer than"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, what):
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    assert what in str(error.value) and "Value error" not in str(error.value) and error.value.fix
    assert "serve.yaml" in error.value.where


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_settings(tmp_path / "none.yaml", {})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"host": "0.0.0.0"}, "without keys"),
        ({"host": "::"}, "without keys"),
        ({"host": "server.example"}, "without keys"),
        ({"admin_host": "0.0.0.0"}, "admin port"),
        ({"admin_host": "10.1.2.3"}, "admin port"),
        ({"host": "0.0.0.0", "admin_host": "0.0.0.0", "keys": "keys.txt"}, "admin port"),
        ({"port": 9000, "admin_port": 9000}, "share a port"),
    ],
)
def test_what_anybody_could_use_is_refused(given, why):
    with pytest.raises(UsageError, match=why) as error:
        check_exposure(read_settings(None, given))
    assert error.value.fix


@pytest.mark.parametrize(
    "given",
    [
        {"host": "localhost"},
        {"host": "::1", "admin_host": "127.0.0.2"},
        {"host": "0.0.0.0", "keys": "keys.txt"},
        {"admin_host": "10.1.2.3", "admin_open": True},
        {"admin_host": "10.1.2.3", "admin_port": None},
        {"port": 0, "admin_port": 0},
    ],
)
def test_what_is_said_explicitly_is_allowed(given):
    check_exposure(read_settings(None, given))

"""Help, exit codes and the two lines of an error, for every verb."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import tmlc.cli.common as common
from tmlc import __version__
from tmlc.cli.main import VERBS, cli
from tmlc.errors import CheckError


def two_lines(text):
    lines = text.strip("\n").split("\n")  # click ends the line of a ^C before ours
    assert len(lines) == 2, text
    assert lines[0].startswith("error: ") and lines[1].startswith("  ") and lines[1].strip()
    return True


def test_help_lists_every_verb_and_the_first_walk(tmlc_cli):
    out = tmlc_cli("--help").stdout
    assert all(f"  {verb} " in out for verb in VERBS)
    assert "tmlc zoo create nano" in out


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself_with_an_example(tmlc_cli, verb):
    out = tmlc_cli(verb, "--help").stdout
    assert f"Usage: tmlc {verb}" in out
    assert f"  tmlc {verb}" in out[out.index("Examples:") :]


@pytest.mark.parametrize("verb", ["compile", "inspect", "verify", "run", "eval", "profile", "doctor"])
def test_every_verb_has_json_and_debug(tmlc_cli, verb):
    out = tmlc_cli(verb, "--help").stdout
    assert "--json" in out and "--debug" in out


@pytest.mark.parametrize("group", [[], ["zoo"]])
def test_without_a_verb_the_help_is_shown_as_it_is(tmlc_cli, group):
    result = tmlc_cli(*group, code=2)
    assert result.stderr == tmlc_cli(*group, "--help").stdout and not result.stdout


def test_version(tmlc_cli):
    assert __version__ in tmlc_cli("--version").stdout


def test_a_verb_that_does_not_exist_is_refused_by_its_name(tmlc_cli):
    text = tmlc_cli("nonsense", code=2).stderr
    assert two_lines(text) and "nonsense" in text


@pytest.mark.parametrize(
    "args",
    [
        ["compile"],
        ["compile", "x"],
        ["compile", "x", "-o", "y", "--nonsense"],
        ["compile", "x", "-o", "y", "--context", "zero"],
        ["compile", "x", "-o", "y", "--preset", "cpu", "--pipeline", "p.yaml"],
        ["inspect"],
        ["inspect", "missing.tmlc"],
        ["verify", "missing.tmlc"],
        ["run", "missing.tmlc", "-o", "out"],
        ["run", "missing.tmlc"],
        ["profile", "missing.tmlc"],
        ["profile", "missing.tmlc", "--budget", "soon"],
        ["profile", "missing.tmlc", "--seconds", "-1"],
        ["zoo", "create", "nano"],
        ["zoo", "create", "giant", "-o", "out"],
        ["zoo", "nonsense"],
        ["doctor", "now"],
        ["serve"],
        ["eval"],
        ["eval", "missing.tmlc"],
        ["eval", "missing.tmlc", "--tasks", "dance"],
        ["eval", "missing.tmlc", "--data", "missing"],
        ["eval", "missing.tmlc", "other.tmlc"],
    ],
)
def test_wrong_usage_is_exit_2_and_two_lines(tmlc_cli, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    assert two_lines(tmlc_cli(*args, code=2).stderr)
    assert list(tmp_path.iterdir()) == []


def test_what_stands_at_the_output_is_not_lost(tmlc_cli, tmp_path, checkpoint):
    """A link that leads nowhere is something; what is no file is not replaced by a file, nor a file by a folder."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link.tmlc").symlink_to("later")
    (tmp_path / "mine").mkdir()
    os.mkfifo(tmp_path / "pipe")
    compile = ("compile", checkpoint, "-o")
    for args, words in (
        ((*compile, tmp_path / "link.tmlc"), "already exists"),
        ((*compile, tmp_path / "pipe", "--force"), "neither a file nor a folder"),
        ((*compile, tmp_path / "mine", "--force"), "is a folder"),
        ((*compile, tmp_path / "file", "--force", "--folder"), "is a file"),
        ((*compile, tmp_path / "file" / "a" / "b"), "is not a folder"),
        ((*compile, tmp_path / "new", "--dump", tmp_path / "file"), "is not a folder"),
        (("zoo", "create", "nano", "-o", tmp_path / "file", "--force"), "is a file"),
    ):
        text = tmlc_cli(*args, code=2).stderr
        assert two_lines(text) and words in text, text  # and no line of progress: nothing was begun
    assert (tmp_path / "file").read_text() == "precious" and (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link.tmlc", "mine", "pipe"]


@pytest.mark.parametrize("option", ["-o", "--junit", "--summary"])
def test_a_folder_that_takes_nothing_is_refused_before_any_work(tmlc_cli, tmp_path, monkeypatch, package, option):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for verb in ("profile", "run") if option == "-o" else ("profile",):
        text = tmlc_cli(verb, package, option, tmp_path / "made", code=2).stderr
        assert two_lines(text) and "nothing can be written there" in text, text
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_no_folder_by_a_file_of_a_report(tmlc_cli, tmp_path, package):
    (tmp_path / "report.json").mkdir()
    text = tmlc_cli("profile", package, "-o", tmp_path / "report", "--force", code=2).stderr
    assert two_lines(text) and "report.json" in text and "is a folder" in text
    assert (tmp_path / "report.json").is_dir()


@pytest.mark.parametrize(("args", "code"), [("doctor --json", 2), ("doctor", 2), ("inspect nothing --json", 2)])
def test_an_output_that_takes_nothing_is_no_traceback(args, code):
    command = f"{sys.executable} -m tmlc.cli.main {args} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr and "error: " in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8_gets_escapes(package, encoding):
    command = [sys.executable, "-m", "tmlc.cli.main", "inspect", str(package)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and b"methods" in done.stdout and not done.stderr


def test_a_file_name_that_is_no_utf_8_costs_no_report(tmlc_cli, package, tmp_path):
    odd = tmp_path / os.fsdecode(b"b\xffd.tmlc")
    odd.symlink_to(package)
    out, quick = tmp_path / os.fsdecode(b"r\xff"), ("--startup-runs", "0", "--sittings", "0", "--no-kernels")
    ci = ("--junit", tmp_path / "gates.xml", "--summary", tmp_path / "summary.md", "--budget", "60s")
    assert "b\\udcffd.tmlc" in tmlc_cli("profile", odd, "--seconds", "1", *quick, *ci, "-o", out).stdout
    view = json.loads(out.with_name(f"{out.name}.json").read_text("utf-8"))
    assert view["package"] == str(odd)
    assert "\\udcff" in out.with_name(f"{out.name}.txt").read_text("utf-8")
    assert (tmp_path / "gates.xml").exists() and (tmp_path / "summary.md").read_text("utf-8")


def test_a_closed_output_is_no_error():
    command = f"{sys.executable} -m tmlc.cli.main zoo >&- 2>&-; {sys.executable} -m tmlc.cli.main --version >&-"
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "args", "extra"),
    [
        ("torch", ["zoo", "list"], "compile"),
        ("torch", ["profile", "x.tmlc", "--ablate", "--checkpoint", "x"], "compile"),
        ("triton", ["tune", "x", "--target", "triton:sm90", "--dry-run"], "triton"),
        ("openai", ["bench", "x.tmlc"], "bench"),
        ("websockets", ["bench", "x.tmlc"], "bench"),
    ],
)
def test_what_a_verb_needs_and_lacks_comes_with_its_command(tmlc_cli, monkeypatch, module, args, extra):
    found = common.find_spec
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == module else found(name))
    text = tmlc_cli(*args, code=2).stderr
    assert two_lines(text) and f"pip install 'tmlc[{extra}]'" in text


def test_the_help_that_an_error_names_is_the_verbs(tmlc_cli):
    assert "see `tmlc profile --help`" in tmlc_cli("profile", "--compare", "one.json", code=2).stderr


def test_with_json_an_error_is_an_object_too(tmlc_cli):
    result = tmlc_cli("inspect", "missing.tmlc", "--json", code=2)
    assert set(result.json["error"]) == {"what", "where", "fix"}
    assert result.json["error"]["where"] == "missing.tmlc"


def failing(monkeypatch, error):
    import tmlc.cli.doctor as doctor

    def callback(as_json):
        raise error

    monkeypatch.setattr(doctor.command, "callback", callback)


def test_a_failed_check_is_exit_1(tmlc_cli, monkeypatch):
    failing(monkeypatch, CheckError("the outputs differ", where="decode", fix="compile again"))
    assert "the outputs differ (decode)" in tmlc_cli("doctor", code=1).stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "x.tmlc"), 2, "free some space"),
        (PermissionError(13, "Permission denied", "x.tmlc"), 2, "x.tmlc"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("division\nby zero"), 70, "a bug in tmlc: ZeroDivisionError: division by zero"),
    ],
)
def test_other_failures_are_two_lines_with_their_own_codes(tmlc_cli, monkeypatch, error, code, words):
    failing(monkeypatch, error)
    text = tmlc_cli("doctor", code=code).stderr
    assert two_lines(text) and words in text


def test_a_traceback_comes_only_with_debug(monkeypatch):
    failing(monkeypatch, ZeroDivisionError("x"))
    assert "Traceback" not in CliRunner().invoke(cli, ["doctor"]).output
    assert isinstance(CliRunner().invoke(cli, ["doctor", "--debug"]).exception, ZeroDivisionError)


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from tmlc.cli.main import cli; cli.main(['--help'])"
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode == 0


def test_help_costs_neither_torch_nor_numpy():
    code = (
        "import sys; from click.testing import CliRunner; from tmlc.cli.main import cli\n"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(cli, ['run', '--help']).exit_code == 0\n"
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

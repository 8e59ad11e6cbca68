"""One nano checkpoint and one package for all tests of the command line, both made by the command line."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from tmlc.cli.main import cli


def run_cli(*args, code=0):
    """Run `tmlc ARGS` in this process; the exit code must be `code`. The result carries `.json` when it parses."""
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    try:
        value = json.loads(result.stdout)
    except ValueError:
        value = None
    return SimpleNamespace(stdout=result.stdout, stderr=result.stderr, json=value)


@pytest.fixture(scope="session")
def tmlc_cli():
    return run_cli


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "nano"
    run_cli("zoo", "create", "nano", "--seed", "0", "-o", folder, "--json")
    return folder


@pytest.fixture(scope="session")
def package(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "nano.tmlc"
    run_cli("compile", checkpoint, "-o", path, "--json")
    return path

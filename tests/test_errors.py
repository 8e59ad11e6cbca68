"""`TmlcError`: what, where, what to do; also behind a process's pipe."""

import pickle

import pytest

import tmlc.errors as errors

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TmlcError)]


@pytest.mark.parametrize("kind", ALL)
def test_an_error_that_comes_from_another_process_is_whole(kind):
    error = kind("what", where="where", fix="do this")
    error.part = 3  # what some of them carry besides
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (its own bytes)
    assert type(again) is kind and str(again) == str(error) == "what (where)\n  do this"
    assert again.part == 3 and again.exit_code == kind.exit_code


def test_an_error_says_what_to_do():
    with pytest.raises(TypeError, match="fix"):
        errors.UsageError("what", where="where")
    assert str(errors.UsageError("what", fix="do this")) == "what\n  do this"

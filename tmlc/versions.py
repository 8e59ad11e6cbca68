"""Versions of the libraries beside tmlc, as numbers that compare."""

import re


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (3, 7, 1) of "3.7.1+git0"; () of what does not begin like a version.

    () is before every release, so that whoever asks for an oldest one refuses it.
    """
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def dotted(numbers: tuple[int, ...]) -> str:
    """ "3.7" of (3, 7)."""
    return ".".join(map(str, numbers))

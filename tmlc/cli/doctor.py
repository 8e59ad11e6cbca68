"""`tmlc doctor`: what this machine can compile for and run, and what is missing."""

from __future__ import annotations

import click

from tmlc.cli.common import print_json, show, verb


@verb(
    "doctor",
    example="""
tmlc doctor
tmlc doctor --json
TMLC_CPU_ISA=portable tmlc doctor
""",
)
def command(as_json: bool) -> None:
    """Say which targets this machine can compile for and run, which kernel variants it has, and what is
    missing.

    Exit code 1 when the target cpu cannot be both compiled and run here.
    """
    from tmlc.report.doctor import doctor_tables, examine

    view = examine()
    if as_json:
        print_json(view)
    else:
        show(*doctor_tables(view))
    if not view["healthy"]:
        click.get_current_context().exit(1)

"""One command for a machine with a GPU: build the engines, check them, time them, beside the floor and PyTorch.

    python perf/gpu/run.py --out perf/results/gpu-h200.json                # goes on where the file stops
    python perf/gpu/run.py --out out/rehearsal.json --rehearse             # the same steps in host memory, for a test

Every step is a result of its own, saved when it is there; a command that is given `--seconds` ends by then, with 3 if
something is left, and the same command again does the rest. Steps run in processes of their own: one that fails, hangs
or loses the device is recorded and the others go on. On a machine without a GPU it builds the engines for `--sm`, says
what was not run, and ends with 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # this folder is scripts, not a package

import bare


def main() -> int:
    bare.prepare(bare.ROOT / "build/gpu/rooms")
    import command

    return command.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

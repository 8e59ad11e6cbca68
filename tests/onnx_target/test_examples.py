"""examples/onnx_node drives a package from JavaScript and says what the runtime says."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import tmlc

FOLDER = Path(__file__).parents[2] / "examples/onnx_node"


@pytest.fixture(scope="module")
def node():
    found = shutil.which("node")
    if found is None:
        pytest.skip("needs Node.js (node on the path)")
    command = [found, "-e", "require('onnxruntime-node')"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs onnxruntime-node: run `make onnx-node` (npm)")
    return found


def said_by_the_runtime(package, tokens, count, seed, heat):
    """Token by token, with the keys that the example uses."""
    with tmlc.load(package, threads=1) as engine:
        session = engine.session()
        said = []
        session.append(tokens=tokens, logits="none")
        while len(said) < count:
            hidden = session._talk.hidden
            key = np.array([[seed, 0, len(said)]], np.int64)
            slot = engine.slots.handle(session.index)
            (ids,) = engine.backend.call("next_token", [(1, slot)], [hidden, key, np.array([[heat]], np.float32)])
            said.append(int(ids[0, 0]))
            session.append(tokens=said[-1:], logits="none")
    return said


@pytest.mark.parametrize(("seed", "heat"), [(0, 0.0), (5, 0.8)])
def test_javascript_says_what_python_says(node, nano, seed, heat):
    tokens = np.random.default_rng(seed).integers(0, 250, 90).tolist()
    command = [node, FOLDER / "talk.mjs", nano["folder"], "--tokens", ",".join(map(str, tokens)), "--count", "12",
               "--seed", str(seed), "--temperature", str(heat)]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == said_by_the_runtime(nano["onnx"], tokens, 12, seed, heat)


def test_javascript_refuses_what_the_signature_forbids(node, nano):
    command = [node, FOLDER / "talk.mjs", nano["folder"], "--tokens", "5,9999"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode and "must be 0 to" in done.stderr

"""TensorRT for an architecture that is not here, and packages whose engines are run by a stand-in of the GPU."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'tmlc[tensorrt]'")

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import tmlc
from tmlc.emit.tensorrt import target as target_room
from tmlc.emit.tensorrt.library import Library, open_library
from tmlc.emit.tensorrt.network import MethodNetwork
from tmlc.model_zoo.interaction import create_checkpoint
from tmlc.package.reader import open_package
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.text import load_tokenizer
from tmlc.runtimes.tensorrt.backend import TensorRTBackend

from ..conformance.test_inkling_text import CONFIGS, random_model
from .stand_in import StandIn

TARGET = "tensorrt:sm89"


@pytest.fixture(scope="session")
def library() -> Library:
    return open_library(TARGET)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Mapping[str, Path]:
    """Folders of nano, a tiny Inkling and a tiny Qwen3-MoE."""
    base = tmp_path_factory.mktemp("models")
    create_checkpoint("nano", 0, base / "nano")
    random_model(CONFIGS["grouped heads, two shared experts"], 1).save_pretrained(base / "inkling")
    config = Qwen3MoeConfig(
        vocab_size=67, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
        intermediate_size=33, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True,
        decoder_sparse_step=1, use_sliding_window=True, sliding_window=7, max_window_layers=1,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).eval().save_pretrained(base / "qwen3_moe")
    return {name: base / name for name in ("nano", "inkling", "qwen3_moe")}


def compile_unbuilt(checkpoint: Path, path: Path, **options) -> dict[bytes, MethodNetwork]:
    """A package whose engines are names, and the networks of these names."""
    made: dict[bytes, MethodNetwork] = {}
    write = target_room.networks

    def keep(*args):
        nets = write(*args)
        made.update({f"engine of {name}".encode(): net for name, net in nets.items()})
        return nets

    def name_only(library, builder, network, shapes, profiles, name, sources, tell):
        return f"engine of {name}".encode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_room, "networks", keep)
        patch.setattr(target_room, "build_engine", name_only)
        patch.setattr(MethodNetwork, "release", lambda self: None)
        tmlc.compile(checkpoint, path, target=TARGET, **options)
    return made


def open_stand_in(path: Path, networks: Mapping[bytes, MethodNetwork], sessions: int = 2) -> tuple[Engine, StandIn]:
    """The package behind the runtime, on a stand-in."""
    package = open_package(path)
    device = StandIn(networks)
    named = package.manifest.tokenizer
    tokenizer = load_tokenizer(package.read(named)) if named else None
    backend = TensorRTBackend(package, TARGET, device)
    return Engine(backend, package.manifest, package.digest, tokenizer, sessions), device


class StandIns:
    """Called with (checkpoint, options of compile): a new engine whose networks are run by the evaluator."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self.folder = folder
        self.known: dict[str, tuple[Path, dict[bytes, MethodNetwork]]] = {}

    def __call__(self, checkpoint: Path, sessions: int = 2, **options) -> tuple[Engine, StandIn]:
        return open_stand_in(*self.entry(checkpoint, options), sessions)

    def path(self, checkpoint: Path, **options) -> Path:
        """Its package."""
        return self.entry(checkpoint, options)[0]

    def entry(self, checkpoint: Path, options: dict) -> tuple[Path, dict[bytes, MethodNetwork]]:
        key = f"{checkpoint} {sorted(options.items())}"
        if key not in self.known:
            path = self.folder() / "tensorrt.tmlc"
            self.known[key] = path, compile_unbuilt(checkpoint, path, **options)
        return self.known[key]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> StandIns:
    return StandIns(lambda: tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory) -> Callable[..., Engine]:
    """(checkpoint, options of compile) → the CPU engine in float32: what the networks are held against."""

    known: dict[str, Path] = {}

    def make(checkpoint: Path, **options) -> Engine:
        key = f"{checkpoint} {sorted(options.items())}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("packages") / "cpu.tmlc"
            tmlc.compile(checkpoint, known[key], precision="fp32", **options)
        return tmlc.load(known[key], threads=1)

    return make

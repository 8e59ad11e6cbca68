"""Small checkpoints for the tests of the frontend."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import TextConfig
from tmlc.model_zoo.interaction.modeling import token_model

sys.path.insert(0, str(Path(__file__).parents[1] / "foreign"))  # stored_codes.py

INKLING = {
    "model_type": "inkling_text", "vocab_size": 40, "unpadded_vocab_size": 37, "hidden_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 5,
    "d_rel": 4, "rel_extent": 6, "log_scaling_n_floor": 4, "local_layer_ids": [0, 1], "intermediate_size": 24,
    "mlp_layer_types": ["dense", "sparse", "sparse"], "moe_intermediate_size": 12, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "n_shared_experts": 2, "logits_mup_width_multiplier": 2.0, "eos_token_id": 2,
}  # fmt: skip


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def write_checkpoint():
    """(folder, config, tensors) → the folder."""
    return write


@pytest.fixture(scope="session")
def inkling_config():
    return dict(INKLING)


@pytest.fixture(scope="session")
def inkling_model():
    """The tiny text model in eager PyTorch, with random weights."""
    model = token_model(TextConfig.from_inkling(INKLING)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            wide = 1.0 if "norm" in name or "global_scale" in name else 0.0
            tensor.copy_(wide + 0.3 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def inkling(tmp_path_factory, inkling_model):
    """The folder of the same model as a checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in inkling_model.state_dict().items()}
    return write(tmp_path_factory.mktemp("inkling") / "tiny", INKLING, tensors)


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """The folder of the nano preset."""
    folder = tmp_path_factory.mktemp("zoo") / "nano"
    create_checkpoint("nano", 0, folder)
    return folder

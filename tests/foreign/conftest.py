"""Random small checkpoints of the foreign families, written by transformers' `save_pretrained`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # random_models.py and stored_codes.py, which tests/gpu takes too

from random_models import random_model


@dataclass
class Case:
    """A checkpoint, tokens, and what transformers makes of them."""

    folder: Path
    model: torch.nn.Module
    ids: torch.Tensor
    logits: torch.Tensor


@pytest.fixture
def foreign_case(tmp_path):
    """(family, seed, positions, changes to the config) → Case."""

    def make(family: str, seed: int, positions: int, **changes: Any) -> Case:
        model = random_model(family, seed, **changes)
        model.save_pretrained(tmp_path / family)
        ids = torch.randint(0, model.config.vocab_size, (positions,), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0]
        return Case(tmp_path / family, model, ids, logits)

    return make


@pytest.fixture
def saved(tmp_path):
    """(family, seed, changes) → the folder of its checkpoint."""

    def make(family: str, seed: int, **changes: Any) -> Path:
        random_model(family, seed, **changes).save_pretrained(tmp_path / f"{family}{seed}")
        return tmp_path / f"{family}{seed}"

    return make

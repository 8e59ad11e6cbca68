"""nano's package, and `live_server.py`, for the tests of clients."""

import sys
from pathlib import Path

import pytest

import tmlc
from tmlc.model_zoo.interaction import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig, read_preset

sys.path.insert(0, str(Path(__file__).parent))  # live_server.py, which the tests of every client share


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of nano."""
    folder = tmp_path_factory.mktemp("nano")
    create_checkpoint(InteractionConfig.from_dict(read_preset("nano")["config"]), seed=0, out_dir=folder / "nano")
    tmlc.compile(folder / "nano", folder / "nano.tmlc", precision="int8")
    return folder / "nano.tmlc"

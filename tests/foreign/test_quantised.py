"""Foreign checkpoints stored quantised, as gpt-oss (MXFP4 experts) and DeepSeek-V3 (FP8 blocks) come, compile to
the engine that their dequantised twins compile to.
"""

import numpy as np
import pytest
from stored_codes import THERE, WAYS, store

import tmlc

if not THERE:
    pytest.skip("needs the dequantiser of transformers 5.22", allow_module_level=True)


@pytest.mark.parametrize(("family", "write", "changes"), WAYS)
def test_the_engine_is_that_of_the_dequantised_checkpoint(family, write, changes, saved, tmp_path):
    plain = saved(family, 0, **changes)
    store(plain, tmp_path / "stored", write)
    answers = []
    for folder in (tmp_path / "stored", plain):
        tmlc.compile(folder, tmp_path / f"{folder.name}.tmlc", precision="fp32")
        with tmlc.load(tmp_path / f"{folder.name}.tmlc", threads=1) as engine, engine.session() as session:
            answers.append(session.append(tokens=list(range(30))))
    assert np.isfinite(answers[0]).all() and answers[0].std() > 0.01
    assert answers[0].tobytes() == answers[1].tobytes()

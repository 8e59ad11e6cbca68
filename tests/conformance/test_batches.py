"""Sessions that are ticked together say, keep and write bit for bit what each would alone: on real packages, in any
company, at any age, with 1 to 8 of them."""

import numpy as np
import pytest
import torch
from transformers import InklingForCausalLM, InklingTextConfig

import tmlc
from tmlc.errors import ContextFullError

MOST, ROUNDS = 8, 10


@pytest.fixture(scope="module")
def ending(unbounded, tmp_path_factory):
    """The package whose context ends after 80 positions."""
    path = tmp_path_factory.mktemp("ending") / "tiny.tmlc"
    tmlc.compile(unbounded[0], path, precision="int8", context=80, context_policy="end")
    return path


@pytest.fixture(scope="module")
def text_package(tmp_path_factory):
    """A token model of transformers, with quantised weights."""
    torch.manual_seed(0)
    config = InklingTextConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4,
        rel_extent=12, local_layer_ids=[0], intermediate_size=48, moe_intermediate_size=24, n_routed_experts=6,
        num_experts_per_tok=2, n_shared_experts=2, dense_mlp_idx=1, eos_token_id=5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("text")
    InklingForCausalLM(config).save_pretrained(folder / "checkpoint")
    tmlc.compile(folder / "checkpoint", folder / "text.tmlc", precision="int8", context=256)
    return folder / "text.tmlc"


def bits(out):
    """All of an output that must not depend on the company."""
    stats = {key: value for key, value in out.stats.items() if key != "batch"}
    return out.index, out.tokens, out.text, out.audio.tobytes(), stats


def mixed(engine, inputs, rng):
    """One of `inputs`, often with something left out or put in: no video, less audio or none, typed text."""
    given = inputs[rng.integers(len(inputs))]
    audio = (given.audio, given.audio[: rng.integers(3200)], None)[rng.choice(3, p=[0.6, 0.2, 0.2])]
    text = ("", "and now?", "x" * 9)[rng.choice(3, p=[0.6, 0.2, 0.2])]
    return tmlc.TickInput(audio=audio, video=given.video if rng.random() < 0.7 else None, text=text or None)


@pytest.mark.parametrize("threads", [1, 2])
def test_random_company_from_tick_to_tick_changes_no_bit(bounded, conversation, threads):
    rng, inputs, said = np.random.default_rng(threads), conversation(12), set()
    with tmlc.load(bounded[1], threads=threads, sessions=2 * MOST + 2) as engine:

        def make():
            return [engine.session(seed=k, temperature=0.7 * (k % 2)) for k in range(MOST)]

        alone, together = make(), make()
        for size in [*range(1, MOST + 1), *rng.integers(1, MOST + 1, ROUNDS)]:
            company = [int(k) for k in rng.permutation(MOST)[:size]]
            given = [mixed(engine, inputs, rng) for _ in company]
            outs = engine.tick_batch([together[k] for k in company], given)
            for k, item, out in zip(company, given, outs, strict=True):
                assert bits(out) == bits(alone[k].tick(item)) and out.stats["batch"] == size
                said.add((out.stats["silent"], len(out.tokens)))
        for one, other in zip(alone, together, strict=True):
            assert one.snapshot() == other.snapshot()
    assert len(said) >= 4, "some spoke and some were silent, and they chose different numbers of tokens"


def test_forks_inside_a_batch_go_on_like_their_parent(bounded, conversation):
    inputs = conversation(10)
    with tmlc.load(bounded[1], threads=2, sessions=4) as engine:
        parent, other = engine.session(seed=1), engine.session(seed=2)
        for given in inputs[:5]:
            engine.tick_batch([other, parent], [None, given])
        twin = parent.fork()
        for given in inputs[5:]:
            one, _, two = engine.tick_batch([parent, other, twin], [given, None, given])
            assert bits(one) == bits(two)
        assert parent.snapshot() == twin.snapshot() != other.snapshot()


def test_more_rows_than_a_call_takes_are_cut_without_a_trace(bounded, conversation):
    """8 sessions with a clip each bring 96 positions, where a call takes 24."""
    given = conversation(1)[0]
    with tmlc.load(bounded[1], threads=2, sessions=MOST + 1) as engine:
        assert engine.capacity().max_append == 24
        outs = engine.tick_batch([engine.session(seed=k) for k in range(MOST)], [given] * MOST)
        for k, out in enumerate(outs):
            with engine.session(seed=k) as session:
                assert bits(session.tick(given)) == bits(out)


@pytest.mark.parametrize("threads", [1, 2])
def test_contexts_that_end_inside_a_tick_take_nobody_with_them(ending, conversation, threads):
    """Eight sessions of different ages, each at another number of positions before the end."""
    inputs = conversation(8)
    ends = []
    with tmlc.load(ending, threads=threads, sessions=2 * MOST) as engine:
        alone, together = ([engine.session(seed=k) for k in range(MOST)] for _ in range(2))
        for k, pair in enumerate(zip(alone, together, strict=True)):
            for session in pair:
                session.append(tokens=list(range(65, 79 + 5 * k)))
        present = list(range(MOST))
        for number, given in enumerate(inputs):
            results = engine.tick_batch([together[k] for k in present], [given] * len(present))
            for k, result in zip(list(present), results, strict=True):
                if isinstance(result, ContextFullError):
                    with pytest.raises(ContextFullError):
                        alone[k].tick(given)
                    assert alone[k].state == together[k].state == "closed"
                    present.remove(k)
                    ends.append(number)
                else:
                    assert bits(result) == bits(alone[k].tick(given))
            for k in present:
                assert alone[k].snapshot() == together[k].snapshot()
    assert len(ends) == MOST and len(set(ends)) > 2, "they ended at different ticks, some with others going on"


def test_a_forged_position_costs_its_own_session_only(ending, conversation):
    """A snapshot proves its own integrity, not who made it; whoever restores one can only hurt that session."""
    (given,) = conversation(1)
    with tmlc.load(ending, threads=2, sessions=3) as engine:
        fine, forged = engine.session(seed=1), engine.session(seed=2)
        numbers = forged._slot[: forged._slot.size // 8 * 8].view(np.int64)
        forged.append(tokens=[65, 66, 67])
        (places,) = np.nonzero(numbers == 3)
        numbers[places] = -5
        results = engine.tick_batch([fine, forged], [given, given])
        assert (fine.state, forged.state) == ("open", "poisoned") and "impossible position" in str(results[1])
        with engine.session(seed=1) as session:
            assert bits(session.tick(given)) == bits(results[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_token_models_keep_their_bits_in_any_company(text_package, threads):
    rng = np.random.default_rng(7)
    with tmlc.load(text_package, threads=threads, sessions=2 * MOST) as engine:
        alone, together = ([engine.session(seed=k, temperature=0.9) for k in range(MOST)] for _ in range(2))
        lengths = set()
        for size in [*range(MOST, 0, -1), *rng.integers(1, MOST + 1, ROUNDS)]:
            company = [int(k) for k in rng.permutation(MOST)[:size]]
            given = [tmlc.TickInput(tokens=rng.integers(6, 67, 1 + rng.integers(9)).tolist()) for _ in company]
            outs = engine.tick_batch([together[k] for k in company], given)
            for k, item, out in zip(company, given, outs, strict=True):
                assert bits(out) == bits(alone[k].tick(item))
                lengths.add(len(out.tokens))
        for one, other in zip(alone, together, strict=True):
            assert one.snapshot() == other.snapshot()


def test_every_method_that_the_compiler_emits_takes_several_sessions(bounded, ending, text_package):
    for package in (bounded[1], ending, text_package):
        with tmlc.load(package, sessions=1) as engine:
            assert engine.backend.unbatched == ""

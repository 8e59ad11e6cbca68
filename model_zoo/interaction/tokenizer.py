"""The tokenizer of a fresh checkpoint: one token for each byte, then the special tokens of the tick layout.

Written in the `tokenizer.json` form of Hugging Face's `tokenizers` (byte-level BPE without merges), which that
library, transformers and our runtime all read.
"""

from __future__ import annotations

from typing import Any

from tmlc.errors import UsageError

from .config import InteractionConfig

# Tokens that the background model's delegations and injections are written with.
_BACKGROUND = ("<delegation>", "<end_of_delegation>", "<injection>", "<end_of_injection>")


def special_tokens(config: InteractionConfig) -> dict[int, str]:
    """Every token that is not a byte, by id, up to the end of the (unpadded) vocabulary.

    Raises:
        UsageError: a special token has the id of a byte, or the vocabulary has no room for the bytes.
    """
    text, tick = config.text_config, config.tick_config
    eos = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    wanted = {
        "<pad>": text.pad_token_id, "<bos>": text.bos_token_id, "<eos>": eos,
        "<silence>": tick.silence_token_id, "<end_of_tick>": tick.end_of_tick_token_id,
    }  # fmt: skip
    names: dict[int, str] = {}
    for name, number in wanted.items():
        if number is None:
            continue
        if not 256 <= number < text.logits_size or number in names:
            raise UsageError(f"token {name} cannot have the id {number}", where=f"configuration {config.name}",
                             fix="give every special token its own id from 256 up to the vocabulary's size")
        names[number] = name
    free = (number for number in range(256, text.logits_size) if number not in names)
    names.update(zip(free, _BACKGROUND, strict=False))
    for number in range(256, text.logits_size):
        names.setdefault(number, f"<reserved_{number}>")
    return dict(sorted(names.items()))


def byte_level_tokenizer(config: InteractionConfig) -> dict[str, Any]:
    """The contents of `tokenizer.json`: token b is byte b."""
    special = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, name in special_tokens(config).items()
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {character: byte for byte, character in enumerate(_printable_bytes())}, "merges": [],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip


def _printable_bytes() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where it prints, else U+0100 and up."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = iter(range(0x100, 0x200))
    return [chr(byte) if byte in prints else chr(next(stand_in)) for byte in range(256)]

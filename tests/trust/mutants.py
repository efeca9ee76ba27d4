"""GGUF files as chance makes them: valid ones, and ones that are valid up to a few bytes."""

from __future__ import annotations

import random
import struct

from fakes.raw_gguf import ARRAY, TEXT, UINT32, Pair, array, number, raw, tensor, text, whole

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Elements and bytes of a block.
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 24: (1, 1), 28: (1, 8)}
WORDS = (b"", b"a", b"general.name", b"\0", b"\xff\xfe", "grüße".encode(), b"x" * 63, b"x" * 64)
NUMBERS = (0, 1, 31, 32, 63, 64, 255, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 60, 1 << 63)
NUMBERS += ((1 << 64) - 1, (1 << 64) - 32, (1 << 64) - 8)


def value(chance: random.Random) -> tuple[int, bytes]:
    """A value with its type."""
    kind = chance.choice([*WIDTHS, TEXT, ARRAY, ARRAY])
    if kind == TEXT:
        return kind, text(chance.choice(WORDS))
    if kind != ARRAY:
        return kind, chance.randbytes(WIDTHS[kind])
    inner, count = chance.choice([*WIDTHS, TEXT, TEXT]), chance.choice([0, 1, 3, 40])
    if inner == TEXT:
        words = b"".join(text(chance.choice(WORDS)) for _ in range(count))
        return kind, array(inner, count, words)
    return kind, array(inner, count, chance.randbytes(count * WIDTHS[inner]))


def valid(chance: random.Random) -> bytes:
    """A file that every reader accepts."""
    alignment = chance.choice([1, 8, 32, 32, 32, 64, 4096])
    pairs: list[Pair] = [
        ("general.architecture", TEXT, text("llama")),
        ("llama.block_count", UINT32, number(chance.randint(1, 512))),
        ("tokenizer.ggml.tokens", ARRAY, array(TEXT, 3, text("a") + text("b") + text("ü"))),
        ("tokenizer.chat_template", TEXT, text("{% if a %}{{ b + (1) }}{% endif %}")),
    ]
    pairs += [(f"test.{n}", *value(chance)) for n in range(chance.randint(0, 5))]
    if alignment != 32:
        pairs.append(("general.alignment", UINT32, number(alignment)))
    chance.shuffle(pairs)
    entries, at, end = [], 0, 0
    for n in range(chance.choice([0, 1, 3, 9])):
        kind = chance.choice(list(BLOCKS))
        block, width = BLOCKS[kind]
        more = [chance.choice([1, 1, 2, 3]) for _ in range(chance.randint(0, 3))]
        shape = (block * chance.randint(1, 3), *more)
        if block == 1 and not more and chance.random() < 0.2:
            shape = ()
        entries.append(tensor(f"blk.{n}.w" + "n" * chance.choice([0, 0, 50]), shape, kind, at))
        size = width
        for length in shape:
            size *= length
        end = at + size // block
        at = -(-end // alignment) * alignment
    version = chance.choice([2, 3])
    header = raw(*pairs, tensors=b"".join(entries), count=len(entries), version=version)
    return whole(header, end, alignment) if entries else header


TOKENIZERS = ("llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "none", "hybriddna", "whitespace")
SPLITTERS = ("default", "llama-bpe", "qwen2", "gpt-2", "kimi-k2", "tekken", "gemma4", "")
ODD_TOKENS = (b"", b"\0", b"\xff\xfe", b"<|eot_id|>", b"\xe2\x96\x81", b"x" * 300, b"\xf0")
MERGES = (b"a b", b"t o", b"", b" ", b"a", b"\xff \xfe", b"to k")
SPECIAL = ("bos", "eos", "eot", "unknown", "seperator", "padding", "mask", "fim_pre", "prefix")
SWITCHES = ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")


def vocabulary(chance: random.Random) -> bytes:
    """A file that holds the vocabulary of a tokenizer, and little else."""

    def often() -> bool:
        return chance.random() < 0.7

    count = chance.choice([3, 40, 270])
    tokens = [b"\n", b" ", b"a"]
    if often():
        tokens = [f"<0x{n:02X}>".encode() for n in range(min(count, 256))]
    tokens += [f"token {n}".encode() for n in range(len(tokens), count)]
    if not often():
        tokens[chance.randrange(count)] = chance.choice(ODD_TOKENS)
    values: dict[str, tuple[int, bytes]] = {
        "model": (TEXT, text(chance.choice(TOKENIZERS))),
        "tokens": (ARRAY, array(TEXT, count, b"".join(map(text, tokens)))),
    }
    if often():
        values["pre"] = TEXT, text(chance.choice(SPLITTERS))
    if often():
        values["scores"] = ARRAY, array(6, count, chance.randbytes(4 * count))
    if often():
        kinds = [chance.choice([1, 1, 1, 2, 3, 4, 5, 0, -1]) for _ in tokens]
        values["token_type"] = ARRAY, array(5, count, struct.pack(f"<{count}i", *kinds))
    if often():
        merges = [chance.choice(MERGES) for _ in range(chance.choice([0, 1, 9]))]
        values["merges"] = ARRAY, array(TEXT, len(merges), b"".join(map(text, merges)))
    if not often():
        length = chance.choice([0, 4, 8, 64, 1024])
        start = struct.pack("<I", chance.choice([0, 4, max(0, length - 8), length]))
        data = (start + chance.randbytes(length))[:length]
        values["precompiled_charsmap"] = ARRAY, array(0, length, data)
    for name in SPECIAL:
        if not often():
            number_of_it = chance.choice([0, 1, count - 1, count, (1 << 32) - 1])
            values[f"{name}_token_id"] = UINT32, number(number_of_it)
    for name in SWITCHES:
        if not often():
            values[name] = 7, bytes([chance.randrange(2)])
    pairs: list[Pair] = [(f"tokenizer.ggml.{key}", *own) for key, own in values.items()]
    name = chance.choice(["llama", "bert", "t5", "qwen2"])
    pairs.append(("general.architecture", TEXT, text(name)))
    return whole(raw(*pairs, tensors=tensor(), count=1), 128)


def mutant(data: bytes, chance: random.Random) -> bytes:
    """The file with some bytes changed, most of them in its header."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = chance.randrange(len(changed))
        how = chance.randrange(6)
        if how == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            changed[at] = chance.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF))
        elif how == 2:
            changed[at : at + 8] = struct.pack("<Q", chance.choice(NUMBERS))
        elif how == 3:
            changed[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS) % (1 << 32))
        elif how == 4:
            del changed[at : at + chance.choice([1, 4, 8, 100])]
        else:
            changed[at:at] = chance.choice([b"\0", bytes(8), changed[at : at + 24]])
        if not changed:
            return b""
    return bytes(changed)

"""Nothing that was changed passes for what was stated or signed: statements and signed files with
random changes, and the same with each check taken out, which has to be noticed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import recorded
from figures import Figure
from seeds import dice

from pipeline.commands import trace
from pipeline.core import signing, statement
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY, Home

CHUNK = 100  # signatures in one start of model-signing


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "hôme ü")


def often(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("times", [few, pytest.param(many, marks=pytest.mark.trust)])


@pytest.fixture
def chance() -> random.Random:
    return dice()


# Statements


def accepted(path: Path, here: statement.Statement) -> bool:
    """Whether a statement passes, as `verify` looks at it."""
    try:
        given = statement.read(path)
        trace.require_known(given)
    except (PipelineError, ValueError):
        return False
    return not statement.differences(here, given)


BESIDES = ("predicate.runDetails", "subject.0.name")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every plain value and every name in a document."""
    if isinstance(value, dict):
        inner = [leaf for key, each in value.items() for leaf in leaves(each, (*path, key))]
        return [*inner, *((*path, key) for key in value)]
    if isinstance(value, list):
        return [leaf for n, each in enumerate(value) for leaf in leaves(each, (*path, n))]
    return [path]


def changed(document: Any, chance: random.Random) -> tuple[Any, str]:
    """The document with one random change, and what it is."""
    data = json.loads(json.dumps(document))
    path = chance.choice(leaves(data))
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    kind = chance.choice(("drop", "value", "rename"))
    if kind == "drop" or not isinstance(path[-1], str):
        del holder[path[-1]]
    elif kind == "value":
        holder[path[-1]] = chance.choice(["x", 7, True, [], {"x": 1}, "a" * 64])
    else:
        holder[f"{path[-1]}{chance.choice('abcxyz')}"] = holder.pop(path[-1])
    return data, f"{kind} {'.'.join(map(str, path))}"


def survivors(home: Home, times: int, chance: random.Random) -> tuple[int, list[str]]:
    """How many changes there were, and which of them were not refused. Not among them: what is the
    builder's word alone, which a signature proves, and the name of the file."""
    file = recorded.quantized(home)
    recorded.built(home)
    here = trace.of_file(file, home)
    place, original = home.root / "statement.json", json.loads(statement.text(here))
    place.write_text(json.dumps(original))
    assert accepted(place, here)
    left, tried = [], 0
    while tried < times:
        data, what = changed(original, chance)
        if data == original or what.split(" ", 1)[1].startswith(BESIDES):
            continue
        tried += 1
        place.write_text(json.dumps(data))
        if accepted(place, here):
            left.append(what)
    return tried, left


@often(300, 20_000)
def test_a_changed_statement_is_refused(
    home: Home, times: int, chance: random.Random, figure: Figure
) -> None:
    tried, left = survivors(home, times, chance)
    assert sorted({*left}) == []
    figure("changed statements refused", tried)


@pytest.mark.parametrize("check", ["differences", "require_known", "_require_digests"])
def test_without_a_check_changes_pass(
    check: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness sees it where a check is taken out."""
    if check == "differences":
        monkeypatch.setattr(statement, "differences", lambda *_: [])
    elif check == "require_known":
        monkeypatch.setattr(trace, "require_known", lambda _: None)
        monkeypatch.setattr(statement, "_of_builds", lambda *_: iter(()))
    else:
        monkeypatch.setattr(statement, "_require_digests", lambda *_: None)
        monkeypatch.setattr(statement, "_of_builds", lambda *_: iter(()))
    _, left = survivors(home, 400, random.Random(1))
    assert left


# Signatures


def keys(folder: Path) -> tuple[Path, Path]:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    private, public = folder / "key.pem", folder / "key.pub"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    for words in (make, ["openssl", "ec", "-in", private, "-pubout", "-out", public]):
        subprocess.run(words, check=True, capture_output=True)
    return private, public


def flipped(data: bytes, chance: random.Random) -> bytes:
    """With one other bit."""
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def passing(home: Home, tmp_path: Path, times: int, chance: random.Random) -> list[Path]:
    """Changed files, and files with a changed signature, that pass as signed."""
    private, public = keys(tmp_path)
    file = recorded.gguf(tmp_path / "mödel.gguf", name="signed")
    cache_home = Home(REPOSITORY)  # model-signing comes from the cache that all share
    (signature,) = signing.sign([file], private, cache_home)
    assert signing.verify({file: signature}, public, cache_home) == {file: ""}
    content, proof = file.read_bytes(), signature.read_bytes()
    payload = json.loads(proof)["dsseEnvelope"]
    left = []
    for start in range(0, times, CHUNK):
        pairs = {}
        for number in range(start, min(times, start + CHUNK)):
            one, sig = tmp_path / f"{number}.gguf", tmp_path / f"{number}.sig"
            if number % 2:
                one.write_bytes(flipped(content, chance))
                sig.write_bytes(proof)
            else:  # what is signed, or the signature itself
                bundle = json.loads(proof)
                name = chance.choice(["payload", "sig"])
                if name == "payload":
                    bundle["dsseEnvelope"]["payload"] = swapped(payload["payload"], chance)
                else:
                    old = payload["signatures"][0]["sig"]
                    bundle["dsseEnvelope"]["signatures"][0]["sig"] = swapped(old, chance)
                one.write_bytes(content)
                sig.write_text(json.dumps(bundle))
            pairs[one] = sig
        answers = signing.verify(pairs, public, cache_home)
        left += [one for one, why in answers.items() if not why]
        for one, sig in pairs.items():
            one.unlink()
            sig.unlink()
    return left


def swapped(text: str, chance: random.Random) -> str:
    """Base64 that means something else: the last letters may mean the same."""
    at = chance.randrange(len(text) - 4)
    other = chance.choice([x for x in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefgh0123" if x != text[at]])
    return text[:at] + other + text[at + 1 :]


@often(20, 1000)
def test_a_changed_file_or_signature_is_refused(
    home: Home, tmp_path: Path, times: int, chance: random.Random, figure: Figure
) -> None:
    assert passing(home, tmp_path, times, chance) == []
    figure("changed signed files refused", times)


def test_a_check_that_is_skipped_is_noticed(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy of the program that does not compare."""
    text = signing.DRIVER.read_text(encoding="utf-8")
    assert "config.verify(target, signature)" in text
    copy = tmp_path / "driver.py"
    copy.write_text(text.replace("config.verify(target, signature)", "pass"), encoding="utf-8")
    monkeypatch.setattr(signing, "DRIVER", copy)
    assert len(passing(home, tmp_path, 4, random.Random(1))) == 4

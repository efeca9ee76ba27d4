"""The same pipeline.lock gives the same bytes: whatever the folder, user, locale, time zone, umask,
hash seed, age and order of files, and number of processors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkouts import Checkout, digest, give, two
from conftest import REPOSITORY
from fakes import hub, tiny_llama
from figures import Figure

TEXT = "A kettle sings, a window rattles, and rain writes on the roof. " * 300
trust = pytest.mark.trust
MODEL = ("model=org/tiny", "imatrix=a text ü.txt", "keep_f16=1")
WORDS = (*MODEL, "quant=q4_k_m")
SERVERS = """
[instance.chat.model]
ref = "org/tiny"
quant = "q4_k_m"
[instance.chat.server]
ctx_size = 512
[instance.other.server]
model = "/models/other.gguf"
port = 8081
"""


@pytest.fixture(scope="module")
def pair(
    built: Path, converter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Checkout, Checkout]]:
    """Two checkouts, in the first of which the model is made and locked."""
    top = tmp_path_factory.mktemp("same")
    tiny_llama.make(top / "hub" / "org" / "tiny", dtype="f16", shards=2)
    with hub.start(top / "hub") as site, two(top / "first") as (first, second):
        for each in (first, second):
            each.env.update(
                HF_ENDPOINT=site.endpoint,
                HF_HUB_DISABLE_XET="1",
                HF_HUB_DISABLE_TELEMETRY="1",
                HF_HOME=str(each.root.parent / "hf"),
            )
            (each.root / "a text ü.txt").write_text(TEXT)
            (each.root / "servers.toml").write_text(SERVERS)
        first("prepare", *WORDS)
        first("lock", *WORDS)
        shutil.copy(first.root / "pipeline.lock", second.root)
        give(second.root.parent)
        yield first, second


# Archives, a lock file and manifests, of stand-ins.
SMALL = """
import os, sys
from pathlib import Path
from pipeline.bins.package import pack
from pipeline.core.paths import Home
from pipeline.deploy.kubernetes import folder
from pipeline.models import lockfile
top = Path(sys.argv[1]) / "a b ü"
names = ["llama-server", *(f"lib{n}.so" for n in range(9))]
(top / "bin").mkdir(parents=True)
for name in sorted(names, reverse=sys.argv[2] == "other"):
    (top / "bin" / name).write_text(name * 1000)
(top / "bin" / "llama-server").chmod(0o700)
pack.make(pack.Package(folder=top / "bin", commit="c" * 40, tree="t" * 40, platform="linux-x64",
    backend="cpu", portable=True, home=Home(top)))
fixed = {"name": "m", "kind": "gguf", "precision": "f16", "source": {"type": "hf"}}
for name in sorted(names, reverse=sys.argv[2] == "other"):
    files = [{"name": name, "size": 1, "sha256": "0" * 64}]
    lockfile.write(top / "pipeline.lock", {"asked": {"model": name}, "files": files, **fixed})
documents = [{"kind": "Secret", "labels": {name: name for name in names}, "names": names}]
folder.write({"a.yaml": folder.text(documents)}, top / "k8s")
"""


def made(tmp_path: Path, code: str = "") -> list[dict[str, str]]:
    """What SMALL makes twice, with `code` before it: the sha256 by name."""
    result = []
    for name, mask, variables in (
        ("one", 0o022, {"TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "1"}),
        ("other", 0o077, {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "2"}),
    ):
        place = tmp_path / name / code[:3]
        subprocess.run(
            [sys.executable, "-c", code + SMALL, place, name],
            env={**os.environ, **variables, "PYTHONPATH": str(REPOSITORY)},
            umask=mask,
            check=True,
            capture_output=True,
        )
        files = [path for path in place.rglob("*") if path.suffix in (".gz", ".zip", ".yaml")]
        files += place.glob("*/pipeline.lock")
        result.append({path.name: digest(path) for path in files})
    return result


def test_small_things(tmp_path: Path) -> None:
    first, second = made(tmp_path)
    assert first == second and len(first) == 4


def test_it_is_seen_that_a_time_is_in_the_bytes(tmp_path: Path) -> None:
    code = "import os\nfrom pipeline.bins.package import pack\npack.MEMBER_TIME = os.getpid()\n"
    first, second = made(tmp_path, code)
    assert [name[-7:] for name in first if first[name] != second[name]] == [".tar.gz"]


@trust
@pytest.mark.build
def test_the_model(pair: tuple[Checkout, Checkout], figure: Figure) -> None:
    first, second = pair
    second("prepare", *WORDS, "frozen=1")
    made = first.sums("models/gguf/**/*.gguf")
    assert {name.rpartition("/")[2].split(".")[1] for name in made if "imatrix" not in name} == {
        "f16",
        "q4_k_m",
    }
    assert second.sums("models/gguf/**/*.gguf") == made
    figure("files with the same bytes", len(made))


@trust
@pytest.mark.build
def test_a_split_model(pair: tuple[Checkout, Checkout], figure: Figure) -> None:
    made = []
    for each in pair:
        if not list(each.root.glob("models/gguf/**/*.f16.gguf")):
            each("prepare", *WORDS, "frozen=1")
        (f16,) = each.root.glob("models/gguf/**/*.f16.gguf")
        (split,) = each.root.glob("bins/*/llama-gguf-split")
        each.run(split, "--split", "--split-max-tensors", "8", f16, "tiny")
        parts = each.sums("tiny-*.gguf")
        each("prepare", f"model={min(parts)}", "quant=q5_k_m")
        (result,) = each.sums("models/gguf/**/*.q5_k_m.gguf").values()
        made.append(parts | {"result": result})
    assert made[0] == made[1] and len(made[0]) > 2
    figure("files with the same bytes", len(made[0]))


@trust
@pytest.mark.build
def test_the_lock_file(pair: tuple[Checkout, Checkout], figure: Figure) -> None:
    first, second = pair
    second("prepare", *WORDS, "frozen=1")
    (second.root / "pipeline.lock").unlink()
    second("lock", *WORDS)
    assert second.sums("pipeline.lock") == first.sums("pipeline.lock")
    figure("files with the same bytes", 1)


@trust
@pytest.mark.build
def test_the_package(pair: tuple[Checkout, Checkout], figure: Figure) -> None:
    for each in pair:
        each("package", "backend=cpu", "portable=0")
    first, second = (each.sums("bins/packages/llama*") for each in pair)
    assert first == second and len(first) == 3, "two archives and their bill"
    figure("files with the same bytes", 2)


@trust
@pytest.mark.build
def test_the_manifests(pair: tuple[Checkout, Checkout], figure: Figure) -> None:
    for each in pair:
        each("kubernetes", "config=servers.toml", "image=registry.example/a:1", "out=k8s ü")
    first, second = (each.sums("k8s ü/*") for each in pair)
    assert first == second and len(first) > 2
    figure("files with the same bytes", len(first))


@trust
@pytest.mark.build
def test_it_would_be_seen_that_a_path_is_in_the_bytes(pair: tuple[Checkout, Checkout]) -> None:
    """As it was: llama-quantize writes the name of the matrix into the GGUF."""
    code = pair[1].root / "pipeline" / "models" / "quantize.py"
    text = code.read_text()
    changed = text.replace('f"./{matrix.name}"', "str(matrix)")
    assert changed != text
    code.write_text(changed)
    try:
        for each in pair:
            each("prepare", *MODEL, "quant=q5_k_s")
    finally:
        code.write_text(text)
    first, second = (each.sums("models/gguf/**/*.q5_k_s.gguf") for each in pair)
    assert first.keys() == second.keys() and first != second

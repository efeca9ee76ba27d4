"""All the ways to a model's code that anybody could think of.

`fires_without`: whether it is one, with the converter run by hand on the model's folder, in the
user's environment. Where it is false, transformers and the converter themselves take no notice.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass

from worlds import COMMIT, FOREIGN, World

STDLIB = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"


@dataclass(frozen=True)
class Route:
    """`lay` lays the canary out. `names` is what is said of it: that the model names this class
    in this file."""

    name: str
    lay: Callable[[World], object]
    fires_without: bool
    names: tuple[str, str] | None = None


def cached(file: str, **values: object) -> Callable[[World], object]:
    """Name code in `file` that the user's Hugging Face cache holds."""

    def lay(world: World) -> None:
        world.fill_cache()
        world.change(file, **values)

    return lay


def raw(file: str, encode: Callable[[str], bytes]) -> Callable[[World], object]:
    """The same, in bytes of its own."""

    def lay(world: World) -> None:
        world.fill_cache()
        text = json.dumps({"auto_map": {"AutoTokenizer": [FOREIGN, None]}})
        (world.model / file).write_bytes(encode(text))

    return lay


def named(name: str, *planted: str) -> Callable[[World], object]:
    """A class for the tokenizer that lies in `planted`, below the world; {top} is the world."""

    def lay(world: World) -> None:
        for path in planted:
            world.plant(world.top / path)
        world.tokenizer({"AutoTokenizer": [name.format(top=world.top), None]})

    return lay


def beside(*names: str) -> Callable[[World], object]:
    """Modules that Python would find, in the model's folder and in the working one."""

    def lay(world: World) -> None:
        for folder in (world.model, world.cwd):
            for name in names:
                code = world.canary.code
                # A .pth file runs lines that begin with `import`.
                world.plant(folder / name, f"import os; exec({code!r})" if ".pth" in name else code)

    return lay


def variable(name: str, value: str, *planted: str) -> Callable[[World], object]:
    """A variable of the user's with folders, where a canary lies."""

    def lay(world: World) -> None:
        for path in planted:
            world.plant(world.top / path)
        world.variables[name] = value.format(top=world.top)

    return lay


def cache_at(name: str, *, below: str = "") -> Callable[[World], object]:
    """A variable of the user's that says where a filled cache is."""

    def lay(world: World) -> None:
        folder = world.top / "their cache"
        world.fill_cache(folder / below)
        world.variables[name] = str(folder)
        world.tokenizer({"AutoTokenizer": [FOREIGN, None]})

    return lay


def filled_modules(world: World) -> None:
    """What transformers copied when the user once let code run."""
    world.fill_cache()
    modules = world.user / ".cache" / "huggingface" / "modules" / "transformers_modules"
    for folder in (
        modules,
        modules / "org",
        modules / "org" / "evil",
        modules / "org/evil" / COMMIT,
    ):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "__init__.py").touch()
    world.plant(modules / "org" / "evil" / COMMIT / "tok.py")
    world.tokenizer({"AutoTokenizer": [FOREIGN, None]})


def by_revision(world: World) -> None:
    world.fill_cache(refs=False)
    world.change(
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": [FOREIGN, None]},
        code_revision=COMMIT,
        revision=COMMIT,
        _commit_hash=COMMIT,
    )


def own_modules_cache(world: World) -> None:
    cache_at("HF_HOME", below="hub")(world)
    variable("HF_MODULES_CACHE", "{top}/modules")(world)


class Pickled:
    """Runs the canary when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self.code,)


def pickled(*names: str) -> Callable[[World], object]:
    def lay(world: World) -> None:
        for name in names:
            (world.model / name).write_bytes(pickle.dumps(Pickled(world.canary.code)))

    return lay


def versioned(world: World) -> None:
    """transformers takes another file in the place of config.json where that says so."""
    cached("config.4.0.0.json", auto_map={"AutoConfig": FOREIGN}, model_type="evil")(world)
    world.change("config.json", configuration_files=["config.4.0.0.json"])


def in_tokenizer(value: object) -> Callable[[World], object]:
    return cached("tokenizer_config.json", auto_map=value)


TOKENIZER, CONFIG = "tokenizer_config.json", "config.json"
SAID = (TOKENIZER, FOREIGN)
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "org.evil.tok.Evil"}]
AWAY = [{"idx": 0, "name": "0", "path": "../../..", "type": "evil.Pooling"}]
DUPLICATE = '{{"auto_map": {{}}, {0}'
ROUTES = [
    # What another repository brought into the user's cache
    Route("slow class", in_tokenizer({"AutoTokenizer": [FOREIGN, None]}), True, SAID),
    Route("fast class", in_tokenizer({"AutoTokenizer": [None, FOREIGN]}), True, SAID),
    Route("a list", in_tokenizer([FOREIGN, None]), True, SAID),
    Route("a text", in_tokenizer({"AutoTokenizer": FOREIGN}), False, SAID),
    Route(
        "for the config",
        cached(CONFIG, auto_map={"AutoConfig": FOREIGN}),
        True,
        (CONFIG, FOREIGN),
    ),
    Route(
        "the tokenizer's in the config",
        cached(CONFIG, auto_map={"AutoTokenizer": [FOREIGN, None]}),
        False,
        (CONFIG, FOREIGN),
    ),
    Route(
        "nested",
        cached(CONFIG, text_config={"auto_map": {"AutoConfig": FOREIGN}}),
        False,
        (CONFIG, FOREIGN),
    ),
    *(
        Route(file, cached(file, auto_map={f"Auto{what}": FOREIGN}), False, (file, FOREIGN))
        for file, what in {
            "processor_config.json": "Processor",
            "preprocessor_config.json": "ImageProcessor",
            "video_preprocessor_config.json": "VideoProcessor",
            "generation_config.json": "Model",
            "adapter_config.json": "Model",
        }.items()
    ),
    Route("another version's config", versioned, True, ("config.4.0.0.json", FOREIGN)),
    Route("by revision", by_revision, False, SAID),
    Route("copied modules", filled_modules, True, SAID),
    # Written in another way
    Route("escaped", raw(TOKENIZER, lambda t: t.replace("a", r"\u0061", 1).encode()), True, SAID),
    Route("twice", raw(TOKENIZER, lambda t: DUPLICATE.format(t[1:]).encode()), True, SAID),
    Route(
        "twice, last empty", raw(TOKENIZER, lambda t: (t[:-1] + ',"auto_map":{}}').encode()), False
    ),
    Route("UTF-16", raw(TOKENIZER, lambda t: t.encode("utf-16")), False),
    Route("byte order mark", raw(TOKENIZER, lambda t: t.encode("utf-8-sig")), False),
    # Any folder
    Route("absolute path", named("{top}/elsewhere/tok.Evil", "elsewhere/tok.py"), True),
    Route("absolute folder", named("{top}/elsewhere--tok.Evil", "elsewhere/tok.py"), True),
    Route("path with dots", named("../elsewhere/tok.Evil", "elsewhere/tok.py"), False),
    Route("folder with dots", named("../elsewhere--tok.Evil", "elsewhere/tok.py"), True),
    Route("working folder", named("evil--tok.Evil", "cwd/evil/tok.py"), True),
    Route("own folder", named("tok.Evil", "evil model/tok.py"), True, (TOKENIZER, "tok.Evil")),
    # Other keys and files
    Route(
        "class as a path",
        cached(TOKENIZER, tokenizer_class="transformers_modules.org.tok.Evil"),
        False,
    ),
    Route("class as a repository", cached(TOKENIZER, tokenizer_class=FOREIGN), False),
    Route("custom_generate", cached("generation_config.json", custom_generate="org/evil"), False),
    Route("trust", cached(TOKENIZER, trust_remote_code=True, tokenizer_class=FOREIGN), False),
    Route(
        "pipelines",
        cached(CONFIG, custom_pipelines={"x": {"impl": "tok.Evil", "pt": ["AutoModel"]}}),
        False,
    ),
    Route(
        "modules of sentence-transformers",
        lambda w: (
            cached(TOKENIZER)(w),
            (w.model / "modules.json").write_text(json.dumps(MODULES)),
        ),
        False,
    ),
    Route(
        "modules far away",
        lambda w: (
            w.plant(w.top / "config.json"),
            (w.model / "modules.json").write_text(json.dumps(AWAY)),
        ),
        False,
    ),
    Route("pickles beside", pickled("pytorch_model.bin", "consolidated.00.pth"), False),
    Route("a pickle as weights", pickled("model.safetensors"), False),
    # Modules that Python finds by itself
    Route("modules beside", beside("torch.py", "transformers.py", "numpy/__init__.py"), False),
    Route("site beside", beside("sitecustomize.py", "usercustomize.py", "conftest.py"), False),
    Route("path file beside", beside("evil.pth", "distutils-precedence.pth"), False),
    # The user's environment
    Route("HF_HOME", cache_at("HF_HOME", below="hub"), True, SAID),
    Route("HF_HUB_CACHE", cache_at("HF_HUB_CACHE"), True, SAID),
    Route("HUGGINGFACE_HUB_CACHE", cache_at("HUGGINGFACE_HUB_CACHE"), True, SAID),
    Route("TRANSFORMERS_CACHE", cache_at("TRANSFORMERS_CACHE"), False, SAID),
    Route("XDG_CACHE_HOME", cache_at("XDG_CACHE_HOME", below="huggingface/hub"), True, SAID),
    Route("HOME", cache_at("HOME", below=".cache/huggingface/hub"), True, SAID),
    Route("HF_MODULES_CACHE", own_modules_cache, True, SAID),
    Route("PYTHONPATH", variable("PYTHONPATH", "{top}/x", "x/torch.py"), True),
    Route("PYTHONPATH, a folder", variable("PYTHONPATH", "{top}/x", "x/numpy/__init__.py"), True),
    Route("PYTHONPATH, site", variable("PYTHONPATH", "{top}/x", "x/sitecustomize.py"), True),
    Route("PYTHONPATH, user", variable("PYTHONPATH", "{top}/x", "x/usercustomize.py"), False),
    Route("PYTHONSTARTUP", variable("PYTHONSTARTUP", "{top}/x/start.py", "x/start.py"), False),
    Route(
        "PYTHONHOME",
        variable("PYTHONHOME", "{top}/x", f"x/{STDLIB}/encodings/__init__.py"),
        True,
    ),
    Route(
        "PYTHONUSERBASE",
        variable("PYTHONUSERBASE", "{top}/x", f"x/{STDLIB}/site-packages/usercustomize.py"),
        False,
    ),
    Route("PYTHONBREAKPOINT", variable("PYTHONBREAKPOINT", "start.go", "cwd/start.py"), False),
]
SMOKE = ("slow class", "absolute path")

"""llama.cpp's own loaders of GGUF headers and of vocabularies, with AddressSanitizer and
UndefinedBehaviorSanitizer: compiled once, in two minutes of a processor, and kept in the user's
cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kept
from conftest import REPOSITORY

from pipeline.bins.compile import source
from pipeline.core.paths import Home
from pipeline.core.store.locks import only_one

# What each needs of llama.cpp.
GGML = (
    *("gguf.cpp", "ggml.c", "ggml.cpp", "ggml-alloc.c", "ggml-backend.cpp"),
    *("ggml-backend-meta.cpp", "ggml-threading.cpp", "ggml-quants.c"),
)
LLAMA = (
    *("llama-vocab.cpp", "llama-model-loader.cpp", "llama-arch.cpp", "llama-hparams.cpp"),
    *("llama-impl.cpp", "llama-mmap.cpp", "unicode.cpp", "unicode-data.cpp"),
)
SOURCES = {
    "model_loader.cpp": [f"ggml/src/{name}" for name in GGML],
    "vocabulary_loader.cpp": [
        *(f"src/{name}" for name in LLAMA),
        *(f"ggml/src/{name}" for name in (*GGML, "ggml-backend-reg.cpp", "ggml-backend-dl.cpp")),
    ],
}
FLAGS = (
    *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"),
    *("-fno-omit-frame-pointer", "-D_GNU_SOURCE", "-D_GLIBCXX_ASSERTIONS"),
)
FOLDERS = ("include", "src", "ggml/include", "ggml/src")
COMPILERS = {".c": ("gcc", "-std=c11"), ".cpp": ("g++", "-std=c++17")}
LIMITS = {
    "ASAN_OPTIONS": "allocator_may_return_null=0:max_allocation_size_mb=1024:detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "GGML_NO_BACKTRACE": "1",
}


def build(main: str, switches: tuple[str, ...] = ()) -> Path:
    """The program, of whose own source `main` is the name. `switches` go to its compiler."""
    top, own = source.find(Home(REPOSITORY)).folder, Path(__file__).with_name(main)
    files = [top / name for name in SOURCES[main]]
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    recipe = [version, repr((FLAGS, COMPILERS, switches)).encode(), own.read_bytes()]
    digest = hashlib.sha256(b"\0".join([*recipe, *(file.read_bytes() for file in files)]))
    folder = kept.FOLDER / own.stem / digest.hexdigest()[:16]
    with only_one(folder):
        if (folder / "loader").exists():
            os.utime(folder)  # used last
            return folder / "loader"
        made = folder.with_name(f"{folder.name}.made")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        # Made by CMake in a build of all.
        (made / "ggml-version.h").write_text('#define GGML_VERSION "0"\n#define GGML_COMMIT "0"\n')
        ccache = [name] if (name := shutil.which("ccache")) else []
        folders = [f"-I{folder}" for folder in (*(top / name for name in FOLDERS), made)]
        objects = []
        for file in (*files, own):
            compiler, *standard = COMPILERS[file.suffix]
            objects.append(str(made / f"{file.name}.o"))
            more = switches if file == own else ()
            words = [*ccache, compiler, *standard, *FLAGS, *more, *folders]
            subprocess.run([*words, "-c", str(file), "-o", objects[-1]], check=True)
        program = str(made / "loader")
        subprocess.run(["g++", *FLAGS, *objects, "-o", program, "-lpthread", "-ldl"], check=True)
        for file in objects:
            Path(file).unlink()
        kept.keep(made, folder)
        shutil.rmtree(made)
    return folder / "loader"


class Loader:
    """The program, started again after each crash."""

    def __init__(self, program: Path, log: Path) -> None:
        self.program, self.log = program, log
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, path: Path) -> str | None:
        """What the program prints for a file; None for a crash."""
        if self.process is None:
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    [self.program],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                    env={**os.environ, **LIMITS},
                )
        assert self.process.stdin and self.process.stdout
        print(path, file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline().strip():
            return line
        self.end()
        return None

    def end(self) -> int:
        """Its exit status: not 0 after a crash, or where memory leaked."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()
        return process.wait()


@contextmanager
def loader(program: Path, log: Path) -> Iterator[Loader]:
    running = Loader(program, log)
    try:
        yield running
        assert running.end() == 0, log.read_text()[-4000:]
    finally:
        if running.process:
            running.process.kill()
        running.end()

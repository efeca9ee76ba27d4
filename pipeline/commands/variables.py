"""Every variable of the command line, with its parser, its help and its default.

The table of steps says which groups, or single variables, a step reads.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.bins.build_options import BuildOptions, revision_name
from pipeline.core.variables import Group, choice, flag, integer, path, text, variable, variables
from pipeline.deploy.kubernetes.options import Options
from pipeline.deploy.ray.options import RayVariables
from pipeline.serve.address import host, host_pattern, origin
from pipeline.serve.server import LLAMA_CPP, SANDBOX_MODES, VLLM

from .parsers import duration, gpu_layers, listed, names, number, quant, server_number, uri

SERVER = "server."  # any other option of llama-server
MODEL_NAMES = ("model", "hf_model", "gguf_path", "safetensors_dir")
HERE, CONTAINER = "here", "container"  # where what is planned will run
LITELLM, ROUTER = "litellm", "router"  # other programs for the gateway
QUALITY, SPEED = "quality", "speed"  # what `compare` measures
LLAMA_SERVERS = "llama-server's"  # own default


class ModelVariables(Group):
    """Which model, and what is made of it."""

    model: str = variable(
        text,
        "a reference: see [models](models.md)",
        shown="one of these four is required, or `config`, or `profile`",
    )
    hf_model: str = variable(text, "a Hugging Face repository, named explicitly")
    gguf_path: str = variable(path, "a `.gguf` file, named explicitly")
    safetensors_dir: str = variable(path, "a model folder, named explicitly")
    quant: str = variable(
        quant,
        "a quant in any letter case; `4.8bpw` or `3GiB`, [the best mix](models.md#mixes) of that "
        "size; `auto` or `fit`, the best quant or mix that fits the memory; for `plan` also `all`",
        shown="`q4_k_m`; for a repository of GGUF files [an order](models.md); for a `.gguf`, the "
        "file as it is",
    )
    revision: str = variable(
        text,
        "branch, tag or commit of a Hugging Face repository",
        shown="`main`, recorded as a commit",
    )
    filename: str = variable(
        text, "which GGUF file of a repository", shown="the one that `quant` names"
    )
    pattern: str = variable(
        text,
        "choose among the GGUF files of a repository that match, with `*` and `?`",
        shown="all",
    )
    mmproj: str = variable(
        path,
        "the projector: a path, a file's name in the repository, or `none`",
        shown="the one that fits, if the repository has one",
    )
    imatrix: str = variable(
        path,
        "path of an importance matrix, or of a text to compute one from; IQ1, IQ2, IQ3_XXS, IQ3_XS "
        "and Q2_K_S need one",
        shown="none",
    )
    draft: str = variable(
        text,
        "a smaller model that [drafts](drafts-and-adapters.md) for it: a reference as for `model`, "
        "or `ngram`, `mtp`",
        shown="none",
    )
    lora: tuple[str, ...] = variable(
        names,
        "[LoRA adapters](drafts-and-adapters.md), with commas between them: a `.gguf`, a folder of "
        "PEFT or a repository each, and behind a colon its scale: `style.gguf:0.5`",
        shown="none",
    )
    keep_f16: bool = variable(flag, "keep the unquantized GGUF after quantizing")


class QualityVariables(Group):
    """What a quant lost against the unquantized model: see [quality](quality.md)."""

    quants: tuple[str, ...] = variable(
        listed(quant),
        "the quants to measure, with commas between them",
        shown="`q4_k_m,q5_k_m,q6_k,q8_0`",
        of=("quality", "compare"),
    )
    max_kld: float | None = variable(
        number(0, 100, 0.05),
        "of a language model: publish the quant only if its KL divergence is not larger, in nats "
        "a token",
        shown="any",
    )
    min_cosine: float | None = variable(
        number(0, 1, 0.99),
        "of an embedding model: publish the quant only if the cosine similarity of its embeddings "
        "is not smaller",
        shown="any",
    )
    text: str = variable(path, "the text to measure on", shown="prose from llama.cpp's documents")
    chunks: int = variable(
        integer(8, 100_000),
        "how many pieces of the text are measured: chunks of 512 tokens (`ctx_size`), passages, or "
        "queries of a reranker; a limit is decided with four times as many at most",
        32,
    )


class CompareVariables(Group):
    """The quants of a model side by side: see [compare](compare.md)."""

    measure: tuple[str, ...] = variable(
        listed(choice(QUALITY, SPEED)),
        "what is measured: `quality`, `speed`, or both with a comma between them",
        (QUALITY, SPEED),
        shown="`quality,speed`",
    )


class PackageVariables(Group):
    """A package to install."""

    pkg: Path | None = variable(path, "the archive")
    into: Path | None = variable(path, "the folder", shown="`bins/package`")


class ProvenanceVariables(Group):
    """Statements and signatures: see [provenance](provenance.md)."""

    key: Path | None = variable(
        path, "a private key as PEM, to sign with", shown="none", of=("provenance", "sign")
    )
    public_key: Path | None = variable(
        path, "a public key as PEM: signatures are checked, and must be there", shown="none"
    )
    signature: Path | None = variable(
        path, "the signature", shown="`FILE.sig`, in a folder `model.sig`"
    )
    provenance: Path | None = variable(
        path, "a statement of provenance", shown="the one beside the file, if there is one"
    )
    builder: str = variable(
        uri,
        "a URI for who builds: `provenance` writes it, `verify` requires it",
        shown="`urn:llama-pipeline:builder`; `verify` takes any",
    )


class UpgradeVariables(Group):
    """Another llama.cpp: see [upgrading](upgrading.md)."""

    to: str = variable(
        revision_name,
        "`latest`, a tag such as `b11549`, a commit, a branch, `previous` or `pinned`",
    )
    bench: bool = variable(flag, "measure the speed of both with `llama-bench`")


class AddressVariables(Group):
    """Where a server listens."""

    host: str = variable(host, LLAMA_SERVERS, "127.0.0.1")
    port: int = variable(integer(1, 65535), f"{LLAMA_SERVERS}, 1 to 65535", 8080)


class ServerVariables(Group):
    """llama-server's own options."""

    ctx_size: int | None = variable(
        server_number("ctx-size"),
        f"{LLAMA_SERVERS}, in tokens; `32k` is 32768",
        shown="the trained context, as far as it fits",
    )
    threads: int | None = variable(server_number("threads"), LLAMA_SERVERS, shown=LLAMA_SERVERS)
    gpu_layers: str | None = variable(gpu_layers, LLAMA_SERVERS, shown=LLAMA_SERVERS)
    parallel: int | None = variable(
        server_number("parallel"),
        f"{LLAMA_SERVERS}; the context is divided among so many slots",
        shown=LLAMA_SERVERS,
    )
    batch_size: int | None = variable(
        server_number("batch-size"),
        LLAMA_SERVERS,
        shown=f"{LLAMA_SERVERS}; for embedding models the context",
    )
    device: str | None = variable(
        text, f"{LLAMA_SERVERS}; a name of a backend means `backend=`", shown=LLAMA_SERVERS
    )
    alias: str | None = variable(text, "the model's name in the API", shown="the model's name")
    api_key_file: str = variable(path, f"{LLAMA_SERVERS}: a file with one key a line", shown="none")


class ServingVariables(Group):
    """How a server is run."""

    sandbox: str = variable(
        choice(*SANDBOX_MODES),
        "llama-server in the [sandbox](security.md#the-server): `auto`, `strict`, `off`",
        SANDBOX_MODES[0],
    )
    guard: bool | None = variable(
        flag,
        "without a key, [pages of other sites](security.md#web-pages) cannot use "
        "llama-server; 0: they can",
        shown="1 for a llama-server that the pipeline made",
    )
    origins: tuple[str, ...] = variable(
        listed(origin),
        "whose pages may use it, too: `https://chat.example`, with `*`, with commas between them",
        shown="this machine's",
    )
    hosts: tuple[str, ...] = variable(
        listed(host_pattern),
        "the names that it may be asked by, such as `gpu-box.lan`, with `*`, with commas between "
        "them",
        shown="this machine's",
    )
    ready_timeout: int = variable(integer(1, 86400), "seconds until the server must be ready", 600)
    stop_timeout: int = variable(integer(0, 3600), "seconds that it has to stop", 10)


class FileVariables(Group):
    """The servers of a file or a profile, and what to do with them."""

    config: str = variable(
        path,
        "a [file of instances](instances.md), for `up`, `plan`, `prepare`, `ps`, `logs`, `down`, "
        "`gateway`, `chat`, `claude`, `systemd`, `kubernetes`, `ray`",
        shown="what the environment names",
    )
    profile: str = variable(
        text,
        "a [profile](profiles.md), for the same and `serve`",
        shown="what the environment names",
    )
    engine: str = variable(
        choice(LLAMA_CPP, VLLM, LITELLM, ROUTER),
        "of the instances that name none: `llama.cpp` or `vllm`; of `gateway` also `litellm`, "
        "`router`",
        shown="`llama.cpp`",
    )
    names: tuple[str, ...] = variable(
        names,
        "these instances alone, with commas between them; for `claude` and `chat` the model",
        shown="all",
        of=("up", "ps", "logs", "down", "load", "unload", "kubernetes", "claude", "chat"),
        name="name",
    )
    background: bool | None = variable(
        flag,
        "0 stays in the foreground with all of them; 1 with none",
        shown="as the file says",
        of=("up",),
    )
    watch: bool = variable(
        flag,
        "stay, and do the same again whenever the file changes; Ctrl-C leaves the servers up",
        of=("up",),
    )
    max_loading: int | None = variable(
        integer(1, 10_000),
        "how many instances load at once",
        shown="as the file says, else all",
        of=("up",),
    )
    target: str = variable(
        choice(HERE, CONTAINER),
        "`container`: plan a file for a container; its paths, GPUs and models are not checked",
        HERE,
        of=("plan",),
    )
    dry_run: bool = variable(
        flag,
        "print what would be started, kept, restarted and stopped; what would be removed; of "
        "`upgrade`: build and compare, and do not switch",
        of=("up", "remove", "prune", "upgrade"),
    )
    follow: bool = variable(flag, "keep printing new lines", of=("logs",))
    lines: int = variable(integer(0, 1_000_000), "how many lines from the end", 50, of=("logs",))
    remote: str = variable(
        path,
        "a [file of servers that run elsewhere](gateway.md#servers-that-run-elsewhere)",
        of=("gateway",),
        name="servers",
    )
    url: str = variable(text, "a server or gateway that is in no file", of=("claude", "chat"))
    start: bool = variable(flag, "start it, instead of printing how", of=("claude", "ray"))


class ChatVariables(Group):
    """What a conversation begins with."""

    prompt: str = variable(
        text,
        "one question: its answer is printed as it is, and nothing else",
        shown="a conversation in the terminal; what a pipe holds",
    )
    system: str = variable(text, "what the model is told before the conversation", shown="none")


class TuneVariables(Group):
    """The fastest settings: see [tuning](tuning.md)."""

    budget: int = variable(
        duration(30, 86400),
        "how long `tune` may measure: seconds, or minutes such as `20m`",
        600,
        shown="`10m`",
        of=("tune",),
    )
    lossy: bool = variable(
        flag, "`tune` may compress the cache too, which changes answers a little", of=("tune",)
    )
    tuned: bool = variable(
        flag,
        "serve with the settings that `tune` found for this model on this machine; `no` leaves "
        "them out",
        True,
    )


class RunVariables(Group):
    """How a run goes about it."""

    force: bool = variable(
        flag, "download and make again; without a model: llama.cpp itself, with its page"
    )
    refresh: bool = variable(
        flag, "ask the hub again what the reference means; decide `quant=auto` and `fit` again"
    )
    frozen: bool = variable(flag, "build exactly what `pipeline.lock` says, or refuse")
    offline: bool = variable(
        flag, "use no network", shown="0; 1 if `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` is"
    )
    yes: bool = variable(flag, "go ahead without asking", of=("remove", "prune", "upgrade"))
    format: str = variable(choice("text", "json"), "`text` or `json`", "text")
    older_than: int = variable(
        integer(0, 36500),
        "days without use, after which build folders, logs and the shared cache may go",
        30,
        of=("prune",),
    )


GROUPS: dict[str, type[Group]] = {
    "model": ModelVariables,
    "quality": QualityVariables,
    "compare": CompareVariables,
    "programs": BuildOptions,
    "package": PackageVariables,
    "signing": ProvenanceVariables,
    "upgrade": UpgradeVariables,
    "address": AddressVariables,
    "server": ServerVariables,
    "serving": ServingVariables,
    "file": FileVariables,
    "run": RunVariables,
    "chat": ChatVariables,
    "tune": TuneVariables,
    "kubernetes": Options,
    "ray": RayVariables,
}
TABLE = tuple(each for group in GROUPS.values() for each in variables(group).values())

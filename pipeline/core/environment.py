"""Which of the user's environment variables a program gets.

A server, and a tool that reads model files, gets the variables listed here. Compilers, package
managers and short probes need whatever the user has set for them: they get all of it but
credentials. Names are compared in upper case, as Windows does; proxies are set in either.

No program gets FOREIGN_MODULES: with them another program's Python modules (ROS, HPC modules) would
hide those of .venv.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping

from .paths import user_folder

# These would silently change a launch: llama-server reads a variable for every option.
INHERITED = ("LLAMA_ARG_", "LLAMA_API_KEY", "LLAMA_SERVER_", "LLAMA_APP_CMD")

FOREIGN_MODULES = ("PYTHONPATH", "PYTHONHOME")

# A trailing * matches any end.
SYSTEM = """
    PATH TMPDIR TEMP TMP LANG LANGUAGE LC_* LOCPATH LOCALE_ARCHIVE TZ TZDIR TERM NO_COLOR
    LD_LIBRARY_PATH LD_PRELOAD DYLD_* NIX_LD* GLIBC_TUNABLES MALLOC_* MIMALLOC_* TCMALLOC_*
    SYSTEMROOT SYSTEMDRIVE WINDIR COMSPEC PATHEXT OS PROCESSOR_* NUMBER_OF_PROCESSORS
    PROGRAMDATA ALLUSERSPROFILE PROGRAMFILES* PROGRAMW6432 COMMONPROGRAM* DRIVERDATA
"""
COMPUTE = """
    GGML_* MTMD_* OMP_* GOMP_* KMP_* MKL_* MKLROOT OPENBLAS_* GOTO_NUM_THREADS BLIS_* VECLIB_*
    CUDA_* CUDNN_* CUBLAS_* CUBLASLT_* NVIDIA_* HIP_* HSA_* ROCR_* ROCM_* ROCBLAS_* HIPBLASLT_*
    MIOPEN_* AMD_* GPU_* VK_* VULKAN_SDK MESA_* RADV_* ANV_* NVK_* LP_* DRI_PRIME XDG_DATA_DIRS
    ONEAPI_* SYCL_* ZE_* ZES_* UR_* IGC_* OCL_ICD_* OPENCL_* OPENVINO_* MTL_* METAL_* ASCEND_*
    MUSA_* SPACEMIT_*
"""
# Caches of compiled kernels and of models are below these.
HOME = """
    HOME USER LOGNAME USERNAME USERPROFILE HOMEDRIVE HOMEPATH APPDATA LOCALAPPDATA XDG_CACHE_HOME
    XDG_DATA_HOME
"""
NETWORK = """
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE
    CURL_CA_BUNDLE
"""
# llama-server's own downloads: from where, and to where. It gets no token.
MIRROR = "HF_ENDPOINT MODEL_ENDPOINT HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE"
# The last few forbid network access or telemetry, for every program.
VLLM = """
    VLLM_* TORCH* PYTORCH_* NCCL_* RCCL_* GLOO_* TRITON_* FLASHINFER_* NVSHMEM_* UCX_* RAY_*
    PIXI_* CONDA_* VIRTUAL_ENV XDG_* UV_* CC CXX CPATH C_INCLUDE_PATH LIBRARY_PATH MAX_JOBS
    TOKENIZERS_PARALLELISM HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_HUB_DISABLE_TELEMETRY
    DO_NOT_TRACK
"""
HUB = "HF_* HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_CACHE TRANSFORMERS_*"
BINS = "LLAMA_SERVER_BINS_DIR"
PLACES = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
OWN = "PYTHON* VIRTUAL_ENV LLAMA_PIPELINE_*"
LITELLM = "LITELLM_*"

# Not TOKENIZERS_PARALLELISM, and not a number of tokens. SSH_AUTH_SOCK belongs to an agent.
SECRET_NAMES = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|COOKIE"
    r"|TOKEN(?![A-Z]|_(BUDGET|COUNT|LIMIT|SIZE|THRESHOLD))|TOKENS$|WEBHOOK|CONNECTION_?STRING"
    r"|(^|_)(AUTH|JWT|BEARER)(_|$)|(^|_)KEYS?$|_(PASS|PWD|PAT)$|^SSHPASS$|^SSH_AGENT_PID$"
    r"|^GPG_AGENT_INFO$|^KRB5CCNAME$|^(BW|OP)_SESSION"
)
VENDORS = (
    *("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "AWS_", "AZURE_", "GOOGLE_", "CLOUDSDK_", "OPENAI_"),
    *("ANTHROPIC_", "GITHUB_", "GH_", "GITLAB_", "KAGGLE_", "VSCODE_GIT_"),
)
# A URL with a password, or with a token as the user; a key; a header; a token.
SECRET_VALUES = re.compile(
    r"(?i:[a-z][a-z0-9+.-]{0,30}://[^/\s@:]*:[^/\s@]+@)|(?i:https?://[^/\s@]+@)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|(?i:\bauthorization:|\bbearer )"
    r"|^\s*(hf_|gh[pousr]_|github_pat_|glpat-|xox[abp]-|sk-|npm_|pypi-|AKIA)[\w-]{16,}\s*$"
)


def place(environ: MutableMapping[str, str]) -> None:
    """Make the paths in PLACES those that they are where the user types: we work in another folder,
    and the libraries that read them know no other."""
    for name in PLACES:
        parts = environ.get(name, "").split(os.pathsep if name == "SSL_CERT_DIR" else "\0")
        # the library that reads it knows what `~` and `$` stand for
        placed = [
            part if part[:1] in ("", "~", "$") else str(user_folder() / part) for part in parts
        ]
        if placed != parts:
            environ[name] = os.pathsep.join(placed)


def servers(environ: Mapping[str, str], *, downloads: bool = False) -> dict[str, str]:
    """What llama-server gets; with `downloads` also what it reaches the network with."""
    more = (NETWORK, MIRROR) if downloads else ()
    listed = _listed(environ, SYSTEM, COMPUTE, HOME, "LLAMA_*", *more)
    return {name: listed[name] for name in listed if not name.upper().startswith(INHERITED)}


def vllm(environ: Mapping[str, str], *, downloads: bool = False) -> dict[str, str]:
    """What vLLM gets; with `downloads` also what it reaches the hub with, the token included."""
    more = (NETWORK, HUB) if downloads else ()
    return servers(environ) | _listed(environ, VLLM, *more, trusted=HUB if downloads else "")


def launch_settings(environ: Mapping[str, str]) -> list[str]:
    """The names of the variables that would silently change a launch."""
    return sorted(name for name in environ if name.startswith(INHERITED) and name != BINS)


def tools(environ: Mapping[str, str]) -> dict[str, str]:
    """What a program gets that only reads and writes files."""
    return _listed(environ, SYSTEM, COMPUTE)


def own(environ: Mapping[str, str], *, downloads: bool = False) -> dict[str, str]:
    """What a Python program of this project gets, such as the gateway; with `downloads`, where it
    prepares models, also what it reaches the hub with, the token included."""
    more = (NETWORK, HUB, BINS) if downloads else ()
    return _listed(environ, SYSTEM, HOME, OWN, *more, trusted=HUB if downloads else "")


def litellm(environ: Mapping[str, str]) -> dict[str, str]:
    """What LiteLLM's proxy gets, which connects only to servers on this machine."""
    return _listed(environ, SYSTEM, HOME, LITELLM)


def without_credentials(environ: Mapping[str, str], keep: Iterable[str] = ()) -> dict[str, str]:
    """All but what looks like a credential. Names that begin with one of `keep` stay: the program's
    own credentials."""
    kept = tuple(start.upper() for start in keep)
    return {
        name: value
        for name, value in environ.items()
        if name not in FOREIGN_MODULES
        and (
            name.upper().startswith(kept)
            or not (name.upper().startswith(VENDORS) or is_credential(name, value))
        )
    }


def is_credential(name: str, value: str) -> bool:
    """Whether a variable looks like a credential. A proxy's password does not count: a program that
    may use the network needs it."""
    name = name.upper()
    if SECRET_NAMES.search(name):
        return True
    return not name.endswith("PROXY") and SECRET_VALUES.search(value) is not None


def _listed(environ: Mapping[str, str], *lists: str, trusted: str = "") -> dict[str, str]:
    """The variables that `lists` name, without credentials that `trusted` does not name."""
    is_listed, is_trusted = _names(" ".join(lists)), _names(trusted)
    return {
        name: value
        for name, value in environ.items()
        if is_listed(name)
        and name not in FOREIGN_MODULES
        and (is_trusted(name) or not is_credential(name, value))
    }


def _names(listed: str) -> Callable[[str], bool]:
    words = listed.split()
    starts = tuple(word[:-1] for word in words if word.endswith("*"))
    return lambda name: name.upper() in words or name.upper().startswith(starts)

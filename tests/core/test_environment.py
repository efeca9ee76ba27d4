"""Which variables of the user's reach which program."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core import environment, process

CREDENTIALS = {
    "HF_TOKEN": "hf_x",
    "HUGGING_FACE_HUB_TOKEN": "hf_x",
    "OPENAI_API_KEY": "sk-x",
    "OPENAI_BASE_URL": "http://example",  # whom somebody pays is nobody's business either
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_PROFILE": "work",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/u/key.json",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=x",
    "GITHUB_TOKEN": "x",
    "GH_TOKEN": "x",
    "CI_JOB_TOKEN": "x",
    "WANDB_API_KEY": "x",
    "KAGGLE_KEY": "x",
    "ngc_api_key": "x",
    "NVIDIA_API_KEY": "x",
    "CUDA_TOKEN": "x",
    "LLAMA_PASSWORD": "x",
    "VLLM_API_KEY": "x",
    "PGPASSWORD": "x",
    "MYSQL_PWD": "x",
    "SSHPASS": "x",
    "SMTP_PASS": "x",
    "GPG_PASSPHRASE": "x",
    "AZURE_DEVOPS_EXT_PAT": "x",
    "SESSION_COOKIE": "x",
    "SLACK_WEBHOOK_URL": "https://hooks.example/x",
    "DOCKER_AUTH_CONFIG": '{"auths": {}}',
    "SSH_AUTH_SOCK": "/tmp/ssh-x/agent.1",
    "SSH_AGENT_PID": "1",
    "DATABASE_URL": "postgres://user:pw@host/db",
    "OMP_URL": "redis://:pw@host",
    "SENTRY_DSN": "https://0123@sentry.example/1",
    "GGML_REMOTE": "see http://user:pw@host/path",
    "DEPLOY": "-----BEGIN OPENSSH PRIVATE KEY-----\nx",
    "HEADER": "Authorization: Basic eDp5",
    "MINE": "ghp_0123456789012345678901234567890123456",
}
HARMLESS = {
    "PATH": "/usr/bin:/home/u@host/bin",
    "PWD": "/work",
    "OLDPWD": "/",
    "EDITOR": "vi",
    "CXX": "ccache g++",
    "CFLAGS": "-O2",
    "CMAKE_PREFIX_PATH": "/opt/a;/opt/b",
    "PKG_CONFIG_PATH": "/opt/lib/pkgconfig",
    "TOKENIZERS_PARALLELISM": "false",
    "KEYBOARD": "us",
    "AUTHOR": "me",
    "GIT_AUTHOR_NAME": "me",
    "MONKEY": "x",
    "COMPASS": "north",
    "MIRROR": "https://example/path?mail=a@b",
    "REMOTE": "ssh://git@host/repository",
    "CALLED": "hf_hub and sk-learn",
}
PROXIES = {
    "HTTPS_PROXY": "http://user:pw@proxy:3128",
    "http_proxy": "http://user:pw@proxy:3128",
    "NO_PROXY": "localhost",
}
CERTIFICATES = {"SSL_CERT_FILE": "/etc/ca.pem", "REQUESTS_CA_BUNDLE": "/etc/ca.pem"}
SYSTEM = {
    "PATH": "/usr/bin",
    "LANG": "de_DE.UTF-8",
    "LC_ALL": "C",
    "TZ": "UTC",
    "TMPDIR": "/tmp",
    "SystemRoot": "C:\\Windows",
    "ProgramFiles(x86)": "C:\\Program Files (x86)",
    "NUMBER_OF_PROCESSORS": "8",
    "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
    "DYLD_LIBRARY_PATH": "/opt/lib",
    "MALLOC_ARENA_MAX": "2",
}
COMPUTE = {
    "CUDA_VISIBLE_DEVICES": "1,0",
    "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1",
    "GGML_VK_VISIBLE_DEVICES": "0",
    "HSA_OVERRIDE_GFX_VERSION": "10.3.0",
    "VK_DRIVER_FILES": "/usr/share/vulkan/icd.d/lvp.json",
    "OMP_NUM_THREADS": "4",
    "ONEAPI_DEVICE_SELECTOR": "level_zero:0",
    "NVIDIA_VISIBLE_DEVICES": "all",
}
USER = {"HOME": "/home/u", "USER": "u", "LocalAppData": "C:\\Users\\u", "XDG_CACHE_HOME": "/c"}
PIPELINE = {"LLAMA_PIPELINE_HOME": "/home/of/pipeline"}
LLAMA = {"LLAMA_CACHE": "/models", "LLAMA_TRACE": "1"} | PIPELINE
PYTHON = {"PYTHONUTF8": "1"}
LITELLM = {"LITELLM_LOG": "INFO"}
TORCH = {
    "VLLM_USE_V1": "1",
    "VLLM_MAX_TOKENS_PER_EXPERT_FUSED_MOE": "9",
    "VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD": "256",
    "TORCH_HOME": "/t",
    "CXX": HARMLESS["CXX"],  # with which kernels are compiled
    "TOKENIZERS_PARALLELISM": HARMLESS["TOKENIZERS_PARALLELISM"],
    "TORCHINDUCTOR_CACHE_DIR": "/t",
    "NCCL_DEBUG": "INFO",
    "CONDA_PREFIX": "/c",
    "XDG_CONFIG_HOME": "/home/u/.config",
    "HF_HUB_OFFLINE": "1",
}
HUB = {
    "HF_TOKEN": "hf_x",
    "HF_HOME": "/hub",
    "HF_ENDPOINT": "http://user:pw@mirror",
    "HUGGING_FACE_HUB_TOKEN": "hf_x",
    "TRANSFORMERS_CACHE": "/hub",
}
FOREIGN_MODULES = {"PYTHONPATH": "/opt/ros/lib", "PYTHONHOME": "/opt/ros"}
UNUSED = {
    "EDITOR": "vi",
    "LLAMA_ARG_CTX_SIZE": "7",
    "LLAMA_SERVER_SLOTS_DEBUG": "1",
    "LLAMA_APP_CMD": "x",
    **FOREIGN_MODULES,
    "AIP_MODE": "PREDICTION",
}
EVERYTHING = {
    **(CREDENTIALS | HARMLESS | HUB | UNUSED | PROXIES | CERTIFICATES),
    **(SYSTEM | COMPUTE | USER | LLAMA | TORCH | PYTHON | LITELLM),
}


@pytest.mark.parametrize("name", sorted(CREDENTIALS))
def test_a_credential_reaches_no_build(name: str) -> None:
    assert environment.without_credentials({name: CREDENTIALS[name], "A": "b"}) == {"A": "b"}


def test_a_build_gets_everything_else() -> None:
    theirs = HARMLESS | PROXIES | CERTIFICATES | SYSTEM | COMPUTE | USER
    assert environment.without_credentials(theirs | FOREIGN_MODULES) == theirs


def test_a_program_keeps_its_own_credentials() -> None:
    own = {
        "PIP_INDEX_URL": "https://user:pw@index/simple",
        "npm_config_//registry/:_authToken": "x",
        "NODE_AUTH_TOKEN": "x",
    }
    pip, npm, token = own.items()
    assert environment.without_credentials(own) == {}
    assert environment.without_credentials(own, ("PIP_",)) == dict([pip])
    assert environment.without_credentials(own, ("NPM_", "NODE_AUTH_TOKEN")) == dict([npm, token])


OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (environment.tools(EVERYTHING), SYSTEM | COMPUTE),
        (environment.servers(EVERYTHING), SYSTEM | COMPUTE | USER | LLAMA),
        (
            environment.servers(EVERYTHING, downloads=True),
            SYSTEM | COMPUTE | USER | LLAMA | PROXIES | CERTIFICATES | {"HF_HOME": "/hub"},
        ),
        (environment.vllm(EVERYTHING), SYSTEM | COMPUTE | USER | LLAMA | TORCH),
        (
            environment.vllm(EVERYTHING, downloads=True),
            SYSTEM | COMPUTE | USER | LLAMA | TORCH | PROXIES | CERTIFICATES | HUB,
        ),
        (environment.own(EVERYTHING), SYSTEM | USER | PYTHON | PIPELINE),
        (
            environment.own(EVERYTHING, downloads=True),
            SYSTEM | USER | PYTHON | PIPELINE | PROXIES | CERTIFICATES | HUB | OFFLINE,
        ),
        (environment.litellm(EVERYTHING), SYSTEM | USER | LITELLM),
    ],
    ids=[
        *("tools", "llama-server", "downloading", "vllm", "vllm-downloading"),
        *("own", "own-downloading", "litellm"),
    ],
)
def test_what_is_listed_arrives_and_nothing_else(
    made: dict[str, str], expected: dict[str, str]
) -> None:
    assert made == expected


def test_a_mirror_without_a_password_is_used() -> None:
    mirror = {"HF_ENDPOINT": "http://mirror"}
    assert environment.servers(mirror, downloads=True) == mirror
    assert environment.servers(mirror) == {}


def by_start_attached(words: list[str], folder: Path) -> str:
    file = folder / "values"
    script = f"{words[-1]}; open({str(file)!r}, 'w').write(values)"
    assert process.start_attached([*words[:-1], script]).wait(timeout=60) == 0
    return file.read_text()


def by_run(words: list[str], folder: Path) -> str:
    assert process.run(words, log=folder / "log") == 0
    return (folder / "log").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    "how",
    [
        lambda words, folder: process.outcome(words)[1],
        lambda words, folder: process.capture(words),
        by_run,
        by_start_attached,
    ],
    ids=["outcome", "capture", "run", "start_attached"],
)
def test_a_program_is_started_without_credentials_unless_told(
    how: Callable[[list[str], Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OF_THE_USER", "kept")
    script = "import os; values = ' '.join(map(str, map(os.environ.get, "
    script += "('OF_THE_USER', 'OPENAI_API_KEY')))); print(values)"
    assert how([sys.executable, "-c", script], tmp_path).strip() == "kept None"


def test_a_given_environment_is_taken_as_it_is() -> None:
    script = "import os; print(os.environ['OPENAI_API_KEY'])"
    env = {**os.environ, "OPENAI_API_KEY": "meant"}
    assert process.outcome([sys.executable, "-c", script], env=env)[1].strip() == "meant"


def test_a_place_is_where_the_user_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path))
    far = str(tmp_path.parent / "far")
    places = {
        "HF_HOME": "hf",
        "HF_TOKEN_PATH": "../token",
        "HF_HUB_CACHE": "~/hub",
        "HUGGINGFACE_HUB_CACHE": "$HOME/hub",
        "SSL_CERT_FILE": far,
        "SSL_CERT_DIR": os.pathsep.join(("certs", far, "")),
        "REQUESTS_CA_BUNDLE": "",
        "HF_TOKEN": "hf",
    }
    environment.place(given := dict(places))
    assert given == places | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN_PATH": str(tmp_path / ".." / "token"),
        "SSL_CERT_DIR": os.pathsep.join((str(tmp_path / "certs"), far, "")),
    }

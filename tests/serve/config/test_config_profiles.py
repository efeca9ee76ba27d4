"""Profiles: YAML, overrides, and what they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from config_tools import FLAGS, server_in, sound, started, written

from pipeline.core.errors import UsageError
from pipeline.serve.config import checks
from pipeline.serve.config.configuration import Configuration, Value, projector_of
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.profiles import load_profile
from pipeline.serve.server import Server

FILE = "llm_profiles.yaml"


def registry(folder: Path, body: str, name: str = "chat") -> Path:
    """A registry with one profile, whose keys are `body`."""
    (folder / "x.gguf").touch()
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return written(folder, f"profiles:\n  {name}:\n{lines}", FILE)


def profile(
    folder: Path,
    body: str,
    environ: Mapping[str, str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Configuration:
    return sound(load_profile(registry(folder, body), "chat", environ or {}, variables=variables))


def wrong(folder: Path, body: str, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(UsageError) as caught:
        profile(folder, body, environ)
    return caught.value.message.splitlines()


def instance_of(found: Configuration, folder: Path) -> Server:
    """Its instance, a model that is there taken as it is."""
    (spec,) = found.specs
    model = PreparedModel(path=Path(spec.model.get("model", "")))
    (instance,) = started(found, folder, models={spec.name: model}).values()
    return instance


LLAMA = "llamacpp:\n  gguf_path: x.gguf\n"


class TestThreeErrors:
    def test_no_registry(self, tmp_path: Path) -> None:
        written(tmp_path, "a: 1", "other.yml")
        with pytest.raises(UsageError, match="there is no registry of profiles") as caught:
            load_profile(tmp_path / FILE, "chat", {})
        assert "other.yml" in caught.value.hint
        assert "LLM_PROFILES_CONFIG_PATH" in caught.value.hint

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("profile:\n  a: {}\nversion: 1", "profile, version"),
            ("- 1", "a list"),
            ("#", "NoneType"),
        ],
    )
    def test_no_profiles(self, tmp_path: Path, text: str, found: str) -> None:
        with pytest.raises(UsageError, match="has no key profiles") as caught:
            load_profile(written(tmp_path, text, FILE), "chat", {})
        assert found in caught.value.hint

    def test_no_such_profile(self, tmp_path: Path) -> None:
        file = written(tmp_path, "profiles:\n  chat: {}\n  coder: {}\n", FILE)
        with pytest.raises(
            UsageError, match="there is no profile caht; did you mean chat"
        ) as caught:
            load_profile(file, "caht", {})
        assert caught.value.hint == "it has chat, coder"
        with pytest.raises(UsageError, match=r"^LLM_PROFILE_NAME=caht: llm_profiles\.yaml: "):
            load_profile(file, "caht", {"LLM_PROFILE_NAME": "caht "})


# Each table merges the one before twice.
DOUBLED = "".join(f"x{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("profiles: [", "line 1, column 12: is not YAML"),
        ("profiles: !!int _", "a value is not what its tag says"),
        ("profiles: !!timestamp tomorrow", "a value is not what its tag says"),
        ("profiles: &a {<<: [" + "*a, " * 101 + "]}", "line 1: merges more than 100 tables"),
        (f"x0: &a0 {{k: v}}\n{DOUBLED}profiles: {{<<: *a39}}", "merges more than 10,000 keys"),
        ('profiles: {x: "\\0"}', "line 1: holds a zero byte or half of a letter"),
        ("profiles:\n\t- a", "line 2, column 1: is not YAML"),
        (
            "profiles: !!python/object:os.system {}",
            "is not YAML: could not determine a constructor",
        ),
        ("profiles: {}\n---\nprofiles: {}", "is not YAML: but found another document"),
        (
            "profiles:\n  chat:\n    backend: vllm\n    backend: x\n",
            "line 4: backend is given twice",
        ),
        ("profiles: {}\nprofiles: {}", "line 2: profiles is given twice"),
        ("a: &a [*a]\nprofiles: 3", "must be a table of profiles by name"),
        ("profiles: []", "must be a table of profiles by name"),
        ("[" * 100_000, "nested too deeply"),
        ("", "is empty"),
        ("x: \x00", "holds zero bytes, as UTF-16 does"),
        ("\ufeffprofiles: []", "must be a table of profiles by name"),
    ],
)
def test_what_is_no_registry(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_profile(written(tmp_path, text, FILE), "chat", {})
    assert FILE in caught.value.message and why in caught.value.message


def test_anchors_that_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    text = "\n".join(lines) + "\nprofiles: {chat: {llamacpp: {model: y}}}"
    assert load_profile(written(tmp_path, text, FILE), "chat", {}).specs[0].server["model"] == "y"


def test_a_profile_inside_itself(tmp_path: Path) -> None:
    text = "profiles:\n  chat: &a\n    gpu: *a\n    llamacpp:\n      x: *a\n"
    with pytest.raises(UsageError, match=r"llamacpp\.x: must be a text, a number"):
        sound(load_profile(written(tmp_path, text, FILE), "chat", {}))


def test_merge_keys(tmp_path: Path) -> None:
    text = "x: &x {port: 1, threads: 2}\nprofiles:\n  chat:\n    llamacpp:\n      <<: *x\n"
    file = written(tmp_path, f"{text}      port: 3\n      model: y\n", FILE)
    (spec,) = load_profile(file, "chat", {}).specs
    assert dict(spec.server) == {"port": 3, "threads": 2, "model": "y"}


def test_mistakes_name_line_and_key(tmp_path: Path) -> None:
    body = """\
display_name: 3
supports_tools: "maybe"
backend: llamacp
gpu:
  device_ids: [0, x]
  max_model_len: -1
  gpu_memory_fraction: 1.5
llamacpp:
  gguf_path: x.gguf
  port: {a: 1}
  extra_args: --x
"""
    assert sorted(wrong(tmp_path, body)) == sorted(
        f"{FILE}: line {line}: profiles.chat.{text}"
        for line, text in [
            (8, "gpu.max_model_len = -1: must be at least 1"),
            (9, "gpu.gpu_memory_fraction = 1.5: must be at most 1"),
            (
                7,
                'gpu.device_ids = […]: must be "all", "none", or ids such as "0" or "2,0"',
            ),
            (3, "display_name = 3: must be a text, in quotes"),
            (4, 'supports_tools = "maybe": must be true or false'),
            (
                5,
                "backend = \"llamacp\": must be 'llamacpp' or 'vllm'; did you mean llamacpp?",
            ),
            (12, "llamacpp.port: must be a text, a number, true, false or a list, not a table"),
            (13, 'llamacpp.extra_args = "--x": must be a list'),
        ]
    )


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    found = profile(tmp_path, f"display_nam: x\ngpu:\n  ids: [0]\n{LLAMA}")
    assert [note.split(": ", 2)[2] for note in found.notes] == [
        "profiles.chat.display_nam: is not known and not used; did you mean display_name?",
        "profiles.chat.gpu.ids: is not known and not used",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *(("hf_file", "hf_filename"), ("hf_repo", "hf_repo_id"), ("quantization", "hf_filename")),
        *(("model_path", "gguf_path"), ("filename", "hf_filename")),
    ],
)
def test_keys_of_the_file_by_other_names(tmp_path: Path, key: str, meant: str) -> None:
    (line,) = wrong(tmp_path, f"{LLAMA}  {key}: x")
    place = f"{FILE}: line 5: profiles.chat.llamacpp.{key}"
    assert line == f"{place}: there is no such key; did you mean {meant}?"


def test_options_that_stand_too_far_out(tmp_path: Path) -> None:
    (note,) = profile(tmp_path, f"n_ctx: 4096\n{LLAMA}").notes
    assert note.endswith("is not known and not used; did you mean llamacpp.ctx_size?")


def test_a_whole_profile(tmp_path: Path) -> None:
    body = """\
display_name: Chat
task_type: chat
model_id: org/chat
supports_tools: true
backend: llamacpp
gpu:
  device_ids: [1, 0]
llamacpp:
  gguf_path: x.gguf
  host: 127.0.0.1
  port: 11980
  ctx_size: 4096
  n_gpu_layers: 99
  threads:
  flash_attn: "on"
  jinja: true
"""
    found = profile(tmp_path, body)
    assert (found.folder, found.notes) == (tmp_path, ())
    instance = instance_of(found, tmp_path)
    assert instance.cmd == (
        *("--model", str(tmp_path / "x.gguf")),
        *("--host", "127.0.0.1", "--port", "11980", "--ctx-size", "4096"),
        *("--n-gpu-layers", "99", "--flash-attn", "on", "--jinja", "--alias", "org/chat"),
        *("--metrics", "--cors-origins", "localhost"),
    )
    assert instance.env["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert (instance.name, instance.port, instance.aliases) == ("chat", 11980, ("org/chat",))
    checks.check(found, server=server_in(tmp_path), flags=FLAGS, environ={})


class TestPrecedence:
    BODY = (
        f"{LLAMA}  ctx_size: 1\n  n_gpu_layers: 2\n  threads: 3\n  parallel: 4\n  batch_size: 5\n"
    )
    ENVIRON: ClassVar = {
        "LLAMACPP_CTX_SIZE_OVERRIDE": "11",
        "LLAMACPP_N_GPU_LAYERS_OVERRIDE": "12",
        "LLAMACPP_THREADS_OVERRIDE": "13",
        "LLAMACPP_PARALLEL_OVERRIDE": "14",
        "LLAMACPP_BATCH_SIZE_OVERRIDE": "15",
    }
    NAMES = ("ctx-size", "n-gpu-layers", "threads", "parallel", "batch-size")

    def values(self, found: Configuration) -> list[Value]:
        return [found.specs[0].server[name] for name in self.NAMES]

    def test_the_profile_alone(self, tmp_path: Path) -> None:
        assert self.values(profile(tmp_path, self.BODY)) == [1, 2, 3, 4, 5]

    def test_the_environment_wins(self, tmp_path: Path) -> None:
        assert self.values(profile(tmp_path, self.BODY, self.ENVIRON)) == [11, 12, 13, 14, 15]
        assert self.values(profile(tmp_path, LLAMA, self.ENVIRON)) == [11, 12, 13, 14, 15]

    def test_blank_is_unset(self, tmp_path: Path) -> None:
        blank = dict.fromkeys([*self.ENVIRON, "CUDA_VISIBLE_DEVICES_OVERRIDE"], "  ")
        found = profile(tmp_path, f"gpu: {{device_ids: [3]}}\n{self.BODY}", blank)
        assert self.values(found) == [1, 2, 3, 4, 5]
        assert found.specs[0].control.gpu_ids == "3"

    def test_where_it_listens_and_its_key(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("secret")
        environ = {
            "LLAMACPP_HOST_OVERRIDE": "0.0.0.0",
            "LLAMACPP_API_KEY_FILE_OVERRIDE": str(tmp_path / "key"),
        }
        body = f"{LLAMA}  host: 127.0.0.1\n  api_key: another\n"
        (spec,) = profile(tmp_path, body, environ).specs
        assert spec.server["host"] == "0.0.0.0"
        assert spec.server["api-key-file"] == str(tmp_path / "key")
        assert "api-key" not in spec.server

    def test_the_command_line_wins_over_all(self, tmp_path: Path) -> None:
        variables = {"ctx_size": "21", "gpu_layers": "all", "threads": "23"}
        found = profile(tmp_path, self.BODY, self.ENVIRON, variables)
        assert self.values(found) == [21, "all", 23, 14, 15]
        assert "gpu-layers" not in found.specs[0].server, "one name of two"
        assert found.specs[0].at("server.ctx-size") == "ctx_size="

    def test_what_is_typed_counts_as_what_is_written(self, tmp_path: Path) -> None:
        variables = {
            **{"parallel": "4", "alias": "007", "server.jinja": "on", "server.metrics": "0"},
            **{"server.flash-attn": "on", "server.cors_origins": "1"},
        }
        found = profile(tmp_path, f"gpu: {{max_model_len: 7}}\n{LLAMA}", variables=variables)
        assert found.specs[0].server["ctx-size"] == 28
        checks.check(found, server=server_in(tmp_path), flags=FLAGS, environ={})
        cmd = " ".join(instance_of(found, tmp_path).cmd)
        for words in ("--parallel 4 --alias 007 --jinja --flash-attn on", "--cors-origins 1"):
            assert words in cmd
        assert "--metrics" not in cmd

    def test_mistakes_of_the_command_line_stand_there(self, tmp_path: Path) -> None:
        variables = {"server.jinja": "x", "parallel": "4", "server.ctx_sise": "1", "port": "0"}
        with pytest.raises(UsageError) as caught:
            found = profile(tmp_path, LLAMA, variables=variables)
            checks.check(found, server=server_in(tmp_path), flags=FLAGS, environ={})
        assert caught.value.message.splitlines() == [
            "port=0: must be a whole number from 1 to 65535",
            "server.jinja=x: --jinja takes no value; write true, or leave it out",
            "server.ctx_sise: llama-server has no --ctx-sise; did you mean ctx_size?",
        ]

    def test_a_file_of_keys_wins_over_a_key(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "k").write_text("key")
        monkeypatch.setenv("PWD", str(tmp_path / "here"))
        monkeypatch.chdir(tmp_path / "here")
        found = profile(tmp_path, f"{LLAMA}  api_key: s3cret\n", variables={"api_key_file": "k"})
        checks.check(found, server=server_in(tmp_path), flags=FLAGS, environ={})
        assert instance_of(found, tmp_path).api_key_file == str(tmp_path / "here" / "k")

    def test_a_path_of_the_command_line_starts_where_the_user_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "t.jinja").write_text("{{ messages }}")
        monkeypatch.setenv("PWD", str(tmp_path / "here"))
        monkeypatch.chdir(tmp_path / "here")
        variables = {"server.chat_template_file": "t.jinja", "server.hf_file": "t.jinja"}
        found = profile(tmp_path, LLAMA, variables=variables)
        checks.check(found, server=server_in(tmp_path), flags=FLAGS, environ={})
        server = instance_of(found, tmp_path)
        assert server.argument("--chat-template-file") == str(tmp_path / "here" / "t.jinja")
        assert server.argument("--hf-file") == "t.jinja", "a name in a repository"

    @pytest.mark.parametrize(
        ("variables", "model", "placed"),
        [
            ({"filename": "z.gguf"}, {"model": "hf:org/y", "filename": "z.gguf"}, "z.gguf"),
            ({"quant": "q8_0"}, {"model": "hf:org/y", "quant": "q8_0"}, None),
            ({"pattern": "*q8*"}, {"model": "hf:org/y", "pattern": "*q8*"}, None),
            (
                {"revision": "v1"},
                {"model": "hf:org/y", "filename": "y.gguf", "revision": "v1"},
                None,
            ),
            ({"filename": "x.gguf"}, {"model": "{}/x.gguf"}, None),
            ({"mmproj": "none"}, {"model": "{}/y.gguf", "mmproj": "none"}, None),
            ({"lora": "a.gguf:2"}, {"model": "{}/y.gguf", "lora": "a.gguf:2"}, None),
        ],
    )
    def test_the_file_of_the_command_line(
        self, tmp_path: Path, variables: dict[str, str], model: dict[str, str], placed: str | None
    ) -> None:
        (tmp_path / "y.gguf").touch()
        body = "llamacpp:\n  model_root: .\n  hf_filename: y.gguf\n  hf_repo_id: org/y\n"
        (spec,) = profile(tmp_path, body, variables=variables).specs
        expected = {key: value.replace("{}", str(tmp_path)) for key, value in model.items()}
        assert dict(spec.model) == expected
        assert spec.download_to == (tmp_path / placed if placed else None)

    def test_the_file_of_the_command_line_is_none_of_vllms(self, tmp_path: Path) -> None:
        variables = {"revision": "v1", "filename": "x"}
        with pytest.raises(UsageError, match="filename=: is for a GGUF, and this profile is vLLM"):
            profile(tmp_path, "backend: vllm\nmodel_id: m\n", variables=variables)
        found = profile(tmp_path, "backend: vllm\nmodel_id: m\n", variables={"revision": "v1"})
        assert found.specs[0].server["revision"] == "v1"

    def test_layers_may_be_words(self, tmp_path: Path) -> None:
        environ = {"LLAMACPP_N_GPU_LAYERS_OVERRIDE": "auto"}
        assert profile(tmp_path, LLAMA, environ).specs[0].server["n-gpu-layers"] == "auto"


class TestCards:
    @pytest.mark.parametrize(
        ("told", "cards"),
        [
            *(("[0, 1]", "0,1"), ("'2,0'", "2,0"), ("3", "3"), ("[]", "none"), ("none", "none")),
            *(("all", "all"), ("['1']", "1"), ("", None)),
        ],
    )
    def test_of_the_profile(self, tmp_path: Path, told: str, cards: str | None) -> None:
        found = profile(tmp_path, f"gpu:\n  device_ids: {told}\n{LLAMA}")
        assert found.specs[0].control.gpu_ids == cards

    @pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
    def test_overridden(self, tmp_path: Path, engine: str) -> None:
        body = f"backend: {engine}\nmodel_id: m\ngpu: {{device_ids: [0]}}\n{LLAMA}"
        environ = {"CUDA_VISIBLE_DEVICES_OVERRIDE": "2,1"}
        found = profile(tmp_path, body, environ)
        instance = instance_of(found, tmp_path)
        assert instance.env["CUDA_VISIBLE_DEVICES"] == "2,1"
        assert instance.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert found.specs[0].at("control.gpu_ids") == "CUDA_VISIBLE_DEVICES_OVERRIDE"

    def test_overridden_with_nonsense(self, tmp_path: Path) -> None:
        (line,) = wrong(tmp_path, LLAMA, {"CUDA_VISIBLE_DEVICES_OVERRIDE": "zero"})
        assert line.startswith('CUDA_VISIBLE_DEVICES_OVERRIDE = "zero": must be "all", "none"')


class TestFile:
    def test_in_the_root(self, tmp_path: Path) -> None:
        root = tmp_path / "root" / "sub"
        root.mkdir(parents=True)
        (root / "y.gguf").touch()
        body = "llamacpp:\n  model_root: root\n  hf_filename: sub/y.gguf\n  hf_repo_id: org/y\n"
        (spec,) = profile(tmp_path, body).specs
        assert spec.model == {"model": str(root / "y.gguf")} and spec.download_to is None

    @pytest.mark.parametrize(
        ("body", "variables", "file"),
        [
            (
                "model_root: r\n  hf_filename: y.gguf\n  hf_repo_id: org/y",
                {"model": "hf:org/y", "filename": "y.gguf"},
                "r/y.gguf",
            ),
            (
                "model_root: r\n  hf_filename: s/y.gguf\n  hf_repo_id: org/y",
                {"model": "hf:org/y", "filename": "s/y.gguf"},
                "r/s/y.gguf",
            ),
            (
                "gguf_path: g/y.gguf\n  hf_repo_id: org/y",
                {"model": "hf:org/y", "filename": "y.gguf"},
                "g/y.gguf",
            ),
            (
                "gguf_path: g/z.gguf\n  hf_repo_id: org/y\n  hf_filename: y.gguf",
                {"model": "hf:org/y", "filename": "y.gguf"},
                "g/z.gguf",
            ),
            ("hf_repo_id: org/y\n  hf_filename: f", {"model": "hf:org/y", "filename": "f"}, None),
            ("hf_repo_id: org/y", {"model": "hf:org/y"}, None),
        ],
    )
    def test_missing_with_a_repository(
        self, tmp_path: Path, body: str, variables: dict[str, str], file: str | None
    ) -> None:
        found = profile(tmp_path, f"llamacpp:\n  {body}\n")
        assert found.prepares() == {"chat": variables}
        assert found.specs[0].download_to == (tmp_path / file if file else None)
        models = {"chat": PreparedModel(path=Path("/m"))}
        (instance,) = started(found, tmp_path, models=models).values()
        assert instance.cmd[:2] == ("--model", "/m")

    def test_the_second_run_is_the_first_one(self, tmp_path: Path) -> None:
        body = "llamacpp:\n  model_root: r\n  hf_filename: y.gguf\n  hf_repo_id: org/y\n"
        file = tmp_path / "r" / "y.gguf"
        model = PreparedModel(path=file, mmproj=projector_of(file), pooling="mean", ctx_size=64)
        found = []
        for _ in range(2):
            configuration = profile(tmp_path, body)
            found += started(configuration, tmp_path, models={"chat": model}).values()
            file.parent.mkdir(exist_ok=True)
            file.touch()
            projector_of(file).touch()
        assert found[0] == found[1] and "--embeddings" in found[1].cmd
        assert configuration.specs[0].model == {
            "model": str(file),
            "mmproj": str(tmp_path / "r" / "mmproj-y.gguf"),
        }

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            ("gguf_path: gone.gguf", "gone.gguf does not exist, and no hf_repo_id says where"),
            ("model_root: r\n  hf_filename: f", "f does not exist, and no hf_repo_id says where"),
            ("", "names no file: gguf_path, or model_root with hf_filename"),
            ("port: 1", "names no file: gguf_path, or model_root with hf_filename"),
            ("hf_filename: f", "names no file: gguf_path, or model_root with hf_filename"),
        ],
    )
    def test_missing_without(self, tmp_path: Path, body: str, why: str) -> None:
        (line,) = wrong(tmp_path, f"llamacpp:\n  {body}\n")
        assert why in line and "profiles.chat.llamacpp" in line

    def test_llama_servers_own(self, tmp_path: Path) -> None:
        (spec,) = profile(tmp_path, "llamacpp:\n  model: z.gguf\n").specs
        assert spec.server["model"] == "z.gguf" and not spec.model


TUNING = """\
gpu:
  num_gpus: 2
  tensor_parallel_size: 2
  max_model_len: 1000
  max_batch_tokens: 512
  max_concurrent_requests: 3
  gpu_memory_fraction: 0.5
"""


class TestTuning:
    def test_llama_server(self, tmp_path: Path) -> None:
        found = profile(tmp_path, TUNING + LLAMA)
        server = found.specs[0].server
        assert (server["parallel"], server["batch-size"], server["ctx-size"]) == (3, 512, 3000)
        assert [note.split(": ", 2)[2] for note in found.notes] == [
            "profiles.chat.gpu.max_model_len: 1000 tokens for each of 3 requests",
            "profiles.chat.gpu.num_gpus: llama-server has no such option",
            "profiles.chat.gpu.tensor_parallel_size: llama-server has no such option",
            "profiles.chat.gpu.gpu_memory_fraction: llama-server has no such option",
        ]

    def test_llama_servers_own_options_win(self, tmp_path: Path) -> None:
        own = "  ctx_size: 1\n  parallel: 2\n  batch_size: 3\n"
        server = profile(tmp_path, TUNING + LLAMA + own).specs[0].server
        assert (server["ctx-size"], server["parallel"], server["batch-size"]) == (1, 2, 3)

    def test_the_context_is_for_one_request(self, tmp_path: Path) -> None:
        found = profile(tmp_path, f"gpu: {{max_model_len: 7}}\n{LLAMA}  parallel: 2\n")
        assert found.specs[0].server["ctx-size"] == 14
        found = profile(tmp_path, f"gpu: {{max_model_len: 7}}\n{LLAMA}")
        assert found.specs[0].server["ctx-size"] == 7 and not found.notes

    def test_vllm(self, tmp_path: Path) -> None:
        found = profile(tmp_path, f"{TUNING}backend: vllm\nmodel_id: org/m\n")
        assert dict(found.specs[0].server) == {
            **{"tensor-parallel-size": 2, "max-model-len": 1000, "max-num-batched-tokens": 512},
            **{"max-num-seqs": 3, "gpu-memory-utilization": 0.5},
            **{"served-model-name": "org/m", "model": "org/m"},
        }
        (note,) = found.notes
        assert "gpu.num_gpus: vLLM has no such option" in note

    def test_beside_gpu(self, tmp_path: Path) -> None:
        found = profile(tmp_path, f"max_model_len: 9\n{LLAMA}")
        assert found.specs[0].server["ctx-size"] == 9
        (line,) = wrong(tmp_path, f"max_model_len: 9\ngpu: {{max_model_len: 8}}\n{LLAMA}")
        assert line.endswith("is given beside gpu too; leave one out")


class TestLabels:
    def test_embeddings(self, tmp_path: Path) -> None:
        body = f"task_type: text-embedding\nsupports_embeddings: true\n{LLAMA}"
        found = profile(tmp_path, body)
        assert found.specs[0].server["embeddings"] is True and not found.notes
        assert instance_of(found, tmp_path).kind == "embedding"

    def test_embeddings_of_vllm(self, tmp_path: Path) -> None:
        body = "backend: vllm\nmodel_id: m\nsupports_embeddings: true\n"
        found = profile(tmp_path, body)
        assert found.specs[0].server["runner"] == "pooling"
        assert instance_of(found, tmp_path).kind == "embedding"
        own = profile(tmp_path, f"{body}vllm:\n  convert: embed\n")
        assert "runner" not in own.specs[0].server

    def test_embeddings_of_a_chat_model(self, tmp_path: Path) -> None:
        (note,) = profile(tmp_path, f"task_type: chat\nsupports_embeddings: true\n{LLAMA}").notes
        assert note.endswith("llama-server then answers for embeddings alone")

    def test_embeddings_said_twice(self, tmp_path: Path) -> None:
        body = f"supports_embeddings: true\n{LLAMA}  embedding: true\n"
        assert "embeddings" not in profile(tmp_path, body).specs[0].server

    def test_an_alias_of_ones_own(self, tmp_path: Path) -> None:
        found = profile(tmp_path, f"model_id: m\n{LLAMA}  alias: mine\n")
        assert found.specs[0].server["alias"] == "mine"


class TestVllm:
    def test_a_model_of_its_own(self, tmp_path: Path) -> None:
        body = "backend: vllm\nmodel_id: m\nvllm:\n  model: org/x\n  enforce_eager: true\n"
        found = profile(tmp_path, f"{body}  extra_args: [--seed, 1]\n")
        (instance,) = started(found, tmp_path).values()
        assert instance.engine == "vllm" and instance.aliases == ("m",)
        assert instance.cmd == (
            *("-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"),
            *("--served-model-name", "m", "--model", "org/x"),
            *("--host", "127.0.0.1", "--port", "8000", "--seed", "1"),
        )

    def test_no_model(self, tmp_path: Path) -> None:
        found = profile(tmp_path, "backend: vllm\n")
        with pytest.raises(UsageError, match=r"chat\.server\.model: is missing"):
            checks.check(found, server=None, flags=None, environ={})

    def test_overrides_of_llama_server_are_said(self, tmp_path: Path) -> None:
        environ = {"LLAMACPP_THREADS_OVERRIDE": "3"}
        (note,) = profile(tmp_path, "backend: vllm\nmodel_id: m\n", environ).notes
        assert note.startswith("LLAMACPP_THREADS_OVERRIDE: is for llama-server")


def test_options_are_checked_with_their_line(tmp_path: Path) -> None:
    found = profile(tmp_path, f"{LLAMA}  ctx_sise: 1\n  flash_attn: true\n")
    with pytest.raises(UsageError) as caught:
        checks.check(found, server=server_in(tmp_path), flags=FLAGS, environ={})
    assert caught.value.message.splitlines() == [
        f"{FILE}: line 5: profiles.chat.llamacpp.ctx_sise: llama-server has no --ctx-sise"
        "; did you mean ctx_size?",
        f"{FILE}: line 6: profiles.chat.llamacpp.flash_attn = true: "
        "must be one of on, off, auto, in quotes",
    ]


def test_a_name_that_cannot_be(tmp_path: Path) -> None:
    file = registry(tmp_path, LLAMA, '"a/b"')
    with pytest.raises(UsageError, match="a name must not hold"):
        sound(load_profile(file, "a/b", {}))

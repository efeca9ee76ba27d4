"""What an option takes, whoever gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_tools import FLAGS, checked, one, server_in, written

from pipeline.core.errors import UsageError
from pipeline.serve.config import checks, vllm
from pipeline.serve.config.profiles import load_profile
from pipeline.serve.flags import Flag, parse_help

SERVER = "[instance.chat.server]\n"
VLLM = f"[instance.chat.control]\nengine = 'vllm'\n{SERVER}model = 'org/x'\n"


def wrong(folder: Path, text: str) -> str:
    """The only mistake, without its place."""
    (line,) = checked(folder, text)
    assert not line.startswith("note: "), line
    return line.removeprefix("models.toml: instance.chat.server.")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('ctx_size = "32,768"', "a whole number, at least 2, or 0"),
        ('ctx_size = "32kb"', "a whole number, at least 2, or 0"),
        ("ctx_size = -1", "a whole number, at least 2, or 0"),
        ("ctx_size = 1", "a whole number, at least 2, or 0"),
        ("ctx_size = 4096.5", "a whole number, at least 2, or 0"),
        ("ctx_size = nan", "a whole number, at least 2, or 0"),
        ('ctx_size = ""', "a whole number, at least 2, or 0"),
        ("ctx_size = 99999999999", "a whole number, at least 2, or 0"),
        ("ctx_size = [4096, 'x']", "a whole number, at least 2, or 0"),
        ("batch_size = 0", "a whole number, at least 2"),
        ("batch_size = 3", "at least 4, its slots"),
        ("batch_size = 6\nparallel = 8", "at least 8, its slots"),
        ('parallel = "2x"', "a whole number from 1 to 256, or -1"),
        ("parallel = 0", "a whole number from 1 to 256, or -1"),
        ('parallel = "2k"', "a whole number from 1 to 256, or -1"),
        ('threads = "two"', "a whole number from -1 to 4096"),
        ("threads = 100000", "a whole number from -1 to 4096"),
        ("n_gpu_layers = 9.5", "a whole number, at least -2, or auto, or all"),
        ("n_gpu_layers = 'most'", "a whole number, at least -2, or auto, or all"),
        ("temp = nan", "a number, such as 0.8"),
        ("temp = inf", "a number, such as 0.8"),
        ("temp = 1e400", "a number, such as 0.8"),
        ('temp = "0,8"', "a number, such as 0.8"),
        ('temp = "warm"', "a number, such as 0.8"),
        ("poll = 200", "a whole number from 0 to 100"),
        ('seed = "12ab"', "a whole number from -1 to 4294967295"),
        ('tensor_split = "3,x"', "a number, such as 0.8"),
        ('fit_target = "1024,1GiB"', "a whole number"),
        ("cache_type_k = 'q9'", "one of f32, f16"),
        ("chat_template_kwargs = '{a: 1}'", "JSON: Expecting property name"),
        ("spec_draft_n_max = '3x'", "a whole number, at least 0"),
        ("sleep_idle_seconds = 0", "a whole number, at least 1, or -1"),
        ("chat_template_kwargs = '[1]'", "an object in JSON"),
        ("grammar = 'json.gbnf'", "a grammar with a rule root ::= …; grammar_file names a file"),
        ("tools = 'read_file,serch'", "one or more of all, read_file, grep_search, "),
        ("tools = 'read_file, all'", "one or more of all, read_file, grep_search, "),
        ("lora_scaled = 'models.toml'", "FILE:SCALE, with commas between them, such as"),
        ("lora_scaled = 'models.toml:1,models.toml:x'", "FILE:SCALE, with commas between"),
    ],
)
def test_a_value_that_is_none(tmp_path: Path, text: str, why: str) -> None:
    found = wrong(tmp_path, SERVER + text)
    assert found.startswith(text.partition(" ")[0]) and f": must be {why}" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('ctx_size = "32k"', "--ctx-size 32768"),
        ('ctx_size = "32K"', "--ctx-size 32768"),
        ('ctx_size = "128 Ki"', "--ctx-size 131072"),
        ('batch_size = "1M"', "--batch-size 1048576"),
        ("ctx_size = 0", "--ctx-size 0"),
        ("ctx_size = 32_768", "--ctx-size 32768"),
        ('ctx_size = " 4096 "', "--ctx-size 4096"),
        ("temp = 1", "--temp 1"),
        ("temp = 1.10", "--temp 1.10"),
        ('temp = "1e-1"', "--temp 1e-1"),
        ("alias = 1.10", "--alias 1.10"),
        ("n_gpu_layers = ' all'", "--n-gpu-layers all"),
        ("n_gpu_layers = 'auto'", "--n-gpu-layers auto"),
        ("parallel = -1", "--parallel -1"),
        ('tensor_split = "3,1.5"', "--tensor-split 3,1.5"),
        ("chat_template_kwargs = '{\"a\": 1}'", '--chat-template-kwargs {"a": 1}'),
        ("chat_template_kwargs = {a = false}", '--chat-template-kwargs {"a": false}'),
        ("chat_template_kwargs.a.b = 'ü'", '--chat-template-kwargs {"a": {"b": "ü"}}'),
        ("log_file = 'new.log'", "--log-file new.log"),
        ("host = '[::1]'", "--host ::1"),
        ("host = 'localhost '", "--host localhost"),
        ("host = 'fe80::1%eth0'", "--host fe80::1%eth0"),
        ("host = 'my-host.local'", "--host my-host.local"),
    ],
)
def test_a_value_as_it_is_passed_on(tmp_path: Path, text: str, words: str) -> None:
    assert all("note: " in line for line in checked(tmp_path, f"{SERVER}api_key = 'x'\n{text}"))
    assert f"{words} " in f"{' '.join(one(tmp_path, SERVER + text).cmd)} "


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1:8080", "http://127.0.0.1", "[::1]:8080", "localhost/", "127.0.0.1,10.0.0.1"),
        *("/tmp/a.sock", "a.sock,b", "256.1.1.1", "127.1", "a b", "-a", "10.0.0.0/8", "*", ""),
        *("[localhost]", "[127.0.0.1]", "::1::2", "user@host", "a..b", "0"),
    ],
)
@pytest.mark.parametrize("engine", ["", "vllm"])
def test_a_host_that_is_none(tmp_path: Path, host: str, engine: str) -> None:
    text = f"{VLLM if engine else SERVER}host = '{host}'"
    assert wrong(tmp_path, text).startswith(
        f'host = "{host}": must be one host name or address alone, such as 127.0.0.1 or ::1'
    )


def test_a_value_is_checked_before_the_options_are_known(tmp_path: Path) -> None:
    from pipeline.serve.config.toml_form import load

    configuration = load(written(tmp_path, f"{SERVER}ctx_size = '32,768'\nhost = 'a:1'"))
    with pytest.raises(UsageError) as caught:
        checks.check(configuration, server=server_in(tmp_path), flags=None, environ={})
    assert len(caught.value.message.splitlines()) == 2


LONG = "x" * 300  # longer than a file's name may be: a template itself, for one


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lora = 'gone'", "lora = gone: {}/gone is not a file"),
        ("lora = 'models.toml,gone'", "lora = gone: {}/gone is not a file"),
        ("lora_scaled = 'models.toml:0.5,gone:1'", "lora_scaled = gone: {}/gone is not a file"),
        ("slot_save_path = 'gone'", "slot_save_path = gone: {}/gone does not exist"),
        ("chat_template_file = 'gone'", "chat_template_file = gone: {}/gone is not a file"),
        (
            f"chat_template_file = '{LONG}'",
            f"chat_template_file = {LONG}: {{}}/{LONG} is not a file",
        ),
        (f"slot_save_path = '{LONG}'", f"slot_save_path = {LONG}: {{}}/{LONG} does not exist"),
        (f"model = '{LONG}'", f"model = {LONG}: {{}}/{LONG} is not a file"),
        (
            "model = 'x-00001-of-00003.gguf'",
            "model = x-00001-of-00003.gguf: {}/x-00001-of-00003.gguf: 1 of its 3 parts",
        ),
    ],
)
def test_a_file_that_is_not_there(tmp_path: Path, text: str, why: str) -> None:
    for number in (1, 2):
        (tmp_path / f"x-0000{number}-of-00003.gguf").touch()
    assert wrong(tmp_path, SERVER + text).startswith(why.replace("{}", str(tmp_path)))


@pytest.mark.parametrize(
    ("option", "data", "why"),
    [
        ("chat_template_file", b"\xef\xbb\xbf{{ messages }}", "begins with a byte order mark"),
        ("chat_template_file", "{{ messages }}".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("chat_template_file", b"\xfc{{ messages }}", "line 1: is not UTF-8; save it as UTF-8"),
        ("chat_template_file", b" \n", "is empty"),
        ("chat_template_file", b"chatml", "is not a template: every prompt would be this text"),
        ("chat_template_file", b"{{ messages }}", ""),
        ("grammar_file", b'root ::= "a"', ""),
        ("grammar_file", b"\xef\xbb\xbfroot ::= [a]", "begins with a byte order mark"),
        ("grammar_file", b'answer ::= "a"', "is not a grammar: it has no rule root ::="),
        ("ui_config_file", b"{a: 1}", "is not JSON: Expecting property name"),
        ("ui_config_file", b"[1]", "is JSON, but no object"),
        ("ui_config_file", b'{"a": 1}', ""),
    ],
)
def test_a_file_that_holds_something_else(
    tmp_path: Path, option: str, data: bytes, why: str
) -> None:
    (tmp_path / "it").write_bytes(data)
    lines = checked(tmp_path, f"{SERVER}model = 'it'\n{option} = 'it'")
    assert len(lines) == bool(why) and why in "".join(lines)


@pytest.mark.parametrize("name", ["models.toml", ""])
def test_a_folder_that_is_none(tmp_path: Path, name: str) -> None:
    why = f" = {name}: {tmp_path / name} is a file, not a folder" if name else ": names nothing"
    assert wrong(tmp_path, f"{SERVER}slot_save_path = '{name}'").startswith(f"slot_save_path{why}")
    assert wrong(tmp_path, f"{SERVER}ui_config_file = '{tmp_path}'").endswith("is not a file")


class TestOfAProfile:
    def lines(self, folder: Path, option: str, environ: dict[str, str] | None = None) -> list[str]:
        """What is said of a profile with this option, and of what the environment overrides."""
        (folder / "x.gguf").touch()
        text = f"profiles:\n  chat:\n    llamacpp:\n      gguf_path: x.gguf\n      {option}\n"
        said: list[str] = []
        try:
            found = load_profile(written(folder, text, "p.yaml"), "chat", environ or {})
            checks.check(found, server=server_in(folder), flags=FLAGS, environ={}, note=said.append)
        except UsageError as error:
            return error.message.splitlines()
        return [f"note: {line}" for line in said]

    @pytest.mark.parametrize(
        ("option", "why"),
        [
            ("ctx_size: 32.5", "line 5: profiles.chat.llamacpp.ctx_size = 32.5: must be a whole"),
            ("ctx_size: 010", "line 5: 010 would be read as 8"),
            ("alias: 007", "line 5: 007 would be read as 7"),
            ("port: 1:30", "line 5: 1:30 would be read as 90"),
            (f"port: 0x{'f' * 4000}", f"line 5: 0x{'f' * 38}…: is too long for a number"),
            (
                "extra_args: ['--temp 1']",
                "line 5: profiles.chat.llamacpp.extra_args: --temp and its value are one text",
            ),
            ("temp: .nan", "line 5: profiles.chat.llamacpp.temp = nan: must be a number"),
            ("host: 127.0.0.1:80", 'line 5: profiles.chat.llamacpp.host = "127.0.0.1:80": must be'),
            (
                "chat_template_kwargs: {a: .nan}",
                "line 5: profiles.chat.llamacpp.chat_template_kwargs: must be a text",
            ),
            ("ctx_size: {a: 1}", "line 5: profiles.chat.llamacpp.ctx_size: must be a text"),
        ],
    )
    def test_wrong(self, tmp_path: Path, option: str, why: str) -> None:
        (line,) = self.lines(tmp_path, option)
        assert line.startswith(f"p.yaml: {why}")

    @pytest.mark.parametrize(
        "option",
        [
            *("alias: 1.10", "temp: 0.80", "flash_attn: on", "flash_attn: off", "jinja: on"),
            *("jinja: yes", "metrics: off", "ctx_size: 4096", "ctx_size: 1_000"),
            "chat_template_kwargs: {enable_thinking: false}",
        ],
    )
    def test_right(self, tmp_path: Path, option: str) -> None:
        assert self.lines(tmp_path, option) == []

    @pytest.mark.parametrize(
        ("name", "value", "why"),
        [
            ("CTX_SIZE", "32,768", "a whole number, at least 2, or 0"),
            ("PARALLEL", "0", "a whole number from 1 to 256, or -1"),
            ("THREADS", "two", "a whole number from -1 to 4096"),
            ("HOST", "http://127.0.0.1", "one host name or address alone, such as"),
            ("PORT", "http", "a whole number from 1 to 65535"),
            ("PORT", "0", "a whole number from 1 to 65535"),
        ],
    )
    def test_overrides(self, tmp_path: Path, name: str, value: str, why: str) -> None:
        variable = f"LLAMACPP_{name}_OVERRIDE"
        (line,) = self.lines(tmp_path, "port: 1", {variable: value})
        shown = value if value.isdecimal() else f'"{value}"'
        assert line.startswith(f"{variable} = {shown}: must be {why}")

    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("LLAMACPP_CTXSIZE_OVERRIDE", "; did you mean LLAMACPP_CTX_SIZE_OVERRIDE?"),
            ("LLAMA_CPP_PORT_OVERRIDE", "; did you mean LLAMACPP_PORT_OVERRIDE?"),
            ("CUDA_VISIBLE_DEVICE_OVERRIDE", "; did you mean CUDA_VISIBLE_DEVICES_OVERRIDE?"),
            (
                "AUTO_INFER_LLAMA_CPP_OVERRIDE",
                "; did you mean AUTO_INFER_LLAMA_CPP_OVERRIDES?",
            ),
        ],
    )
    def test_an_override_that_is_none(self, tmp_path: Path, name: str, near: str) -> None:
        assert self.lines(tmp_path, "port: 1", {name: "1"}) == [
            f"{name}: there is no such override{near}"
        ]
        assert self.lines(tmp_path, "port: 1", {name: " "}) == []

    def test_an_override_with_a_unit(self, tmp_path: Path) -> None:
        variable = "LLAMACPP_CTX_SIZE_OVERRIDE"
        lines = self.lines(tmp_path, "port: 1", {variable: "32k"})
        assert lines == [f'note: {variable} = "32k": taken as 32768']


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('max_model_len = "32,768"', "a whole number, at least 1, or -1"),
        ("max_model_len = 0", "a whole number, at least 1, or -1"),
        ("tensor_parallel_size = 0", "a whole number, at least 1"),
        ('tensor_parallel_size = "two"', "a whole number, at least 1"),
        ("gpu_memory_utilization = '90%'", "a number above 0"),
        ("gpu_memory_utilization = nan", "a number above 0, at most 1"),
        ("gpu_memory_utilization = 90", "a number above 0, at most 1"),
        ("max_num_seqs = 2.5", "a whole number, at least 1"),
        ("speculative_config = '{a: 1}'", "JSON: Expecting property name"),
        ("hf_overrides = '{'", "JSON: Expecting property name"),
        ("dtype = 'fp16'", "one of auto, half, float16, bfloat16, float, float32"),
        ("port = 'x'", "a whole number from 1 to 65535"),
    ],
)
def test_a_value_that_vllm_does_not_take(tmp_path: Path, text: str, why: str) -> None:
    assert f": must be {why}" in wrong(tmp_path, VLLM + text)


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("chat_template = 'gone.jinja'", True),
        ("chat_template = 'models.toml'", False),
        ("chat_template = '{{ messages }}'", False),
        ("ssl_certfile = 'gone.pem'", True),
        ("log_config_file = 'gone.json'", True),
    ],
)
def test_a_file_that_vllm_would_not_find(tmp_path: Path, text: str, is_wrong: bool) -> None:
    lines = [line for line in checked(tmp_path, VLLM + text) if "note: " not in line]
    assert [line.endswith(" is not a file") for line in lines] == [True] * is_wrong


def test_vllm_reads_units_itself(tmp_path: Path) -> None:
    cmd = " ".join(one(tmp_path, f"{VLLM}max_model_len = '25.6k'\n").cmd)
    assert "--max-model-len 25.6k" in cmd


def test_a_table_for_json_of_vllm(tmp_path: Path) -> None:
    table = "speculative_config = {method = 'ngram', num_speculative_tokens = 3}"
    words = one(tmp_path, f"{VLLM}{table}\n").cmd
    assert '{"method": "ngram", "num_speculative_tokens": 3}' in words
    table = "[instance.chat.server.compilation_config]\nmode = 3\n"
    assert '{"mode": 3}' in one(tmp_path, VLLM + table).cmd


def test_another_vllm_says_which_choices_it_has_and_the_list_what_is_a_number() -> None:
    found = vllm.parse("  --dtype {auto,half}\n  --max-num-seqs MAX_NUM_SEQS\n")
    assert found["dtype"].choices == ["auto", "half"]
    assert found["max-num-seqs"].value == "INT"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hf_token", "server.hf_token: --hf-token would be visible in the process list; set HF"),
        ("model_url", "server.model_url: contradicts the model that is named; leave one out"),
    ],
)
def test_what_is_typed_is_not_told_of_tables(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / "x.gguf").touch()
    text = "profiles:\n  chat:\n    llamacpp:\n      gguf_path: x.gguf\n"
    file = written(tmp_path, text, "p.yaml")
    profile = load_profile(file, "chat", {}, {f"server.{name}": "http://x"})
    with pytest.raises(UsageError) as caught:
        checks.check(profile, server=server_in(tmp_path), flags=FLAGS, environ={})
    assert caught.value.message.startswith(line)


@pytest.mark.build
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("usage = true", "usage: with --help llama-server prints something and ends; leave it out"),
        ("list_devices = true", "list_devices: with --list-devices llama-server prints something"),
        ("extra_args = ['-h']", "extra_args: with --help llama-server prints something and ends"),
        ("version = false", ""),
    ],
)
def test_an_option_with_which_nothing_is_served(
    built: Path, tmp_path: Path, text: str, why: str
) -> None:
    from pipeline.core.process import capture
    from pipeline.serve.config.toml_form import load

    (server,) = built.glob("linux-*-cpu/llama-server")
    flags = parse_help(capture([server, "--help"]) or "")
    configuration = load(written(tmp_path, SERVER + text))
    try:
        checks.check(configuration, server=server, flags=flags, environ={})
        found = ""
    except UsageError as error:
        found = error.message.removeprefix("models.toml: instance.chat.server.")
    assert found.startswith(why) and bool(found) == bool(why)


def test_a_name_that_is_none_is_not_passed_on_to_vllm(tmp_path: Path) -> None:
    assert wrong(tmp_path, f"{VLLM}'' = 5").endswith(" has no --")
    assert "has no --a b" in wrong(tmp_path, f"{VLLM}'a b' = 5")


@pytest.mark.build
@pytest.mark.parametrize(
    ("option", "right", "wrong_ones"),
    [
        ("logit-bias", ["15043+1", "15043-0.5", "2-inf", "7 + 1e3"], ["abc", "15043=1", "x+1", 5]),
        (
            "override-kv",
            ["a.b=bool:false", "a=int:-1,b=float:1.5", "a=str:x y", 'a=str:"x,y"'],
            ["a", "a=3", "a=int:x", "a=bool:yes", "a=integer:3", "a=bool:true,b"],
        ),
        ("override-tensor", ["exps=CPU", r"blk\.[0-9]+\.ffn=CPU,x=CUDA0"], ["exps", "a=CPU,b"]),
        ("cpu-range", ["0-7", "-7", "3-", "0-511"], ["3", "a-b", "0-512", "0-1-2"]),
        ("cpu-mask", ["ff", "0xFF", "11"], ["zz", "", 255]),
        ("samplers", ["top_k;min-p;temp", "TopK"], ["top_k,top_p", "top_k;warm"]),
        ("sampler-seq", ["kpm"], ["kpz", ""]),
        ("hf-repo", ["org/model", "org/model:Q4_K_M"], ["model", "https://hub/org/model", ""]),
        ("chat-template-kwargs", ['{"a": false}'], ["{'a': false}", "a"]),
    ],
)
def test_a_form_that_the_real_program_reads(
    built: Path, option: str, right: list[str], wrong_ones: list[str | int]
) -> None:
    from pipeline.core.process import capture
    from pipeline.serve.config import values

    (server,) = built.glob("linux-*-cpu/llama-server")
    flags = parse_help(capture([server, "--help"]) or "")
    for text in right:
        assert values.read(option, flags[option], text) == text
    for value in wrong_ones:
        with pytest.raises(ValueError):
            values.read(option, flags[option], value)


def test_a_mask_that_is_typed_beside_a_profile_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    text = "profiles:\n  chat:\n    llamacpp:\n      gguf_path: x.gguf\n"
    variables = {"server.cpu_mask": "11"}
    profile = load_profile(written(tmp_path, text, "p.yaml"), "chat", {}, variables)
    assert profile.specs[0].server["cpu-mask"] == "11"


@pytest.mark.build
def test_the_kinds_of_the_real_program(built: Path) -> None:
    """Each option that takes a number says so in its help, and its default is one of them."""
    import re

    from pipeline.core.process import capture
    from pipeline.serve.config import values

    (server,) = built.glob("linux-*-cpu/llama-server")
    flags: dict[str, Flag] = parse_help(capture([server, "--help"]) or "")
    assert {*values.DECIMALS, *values.TOKENS} <= flags.keys()
    assert values.RANGES.keys() <= {*flags, *vllm.listed().flags}
    for name, flag in flags.items():
        default = re.search(r"default: ([\w.+-]+)(?=[,)\s])", flag.help)
        if default and flag.value and re.fullmatch(r"[\d.-]+", default[1]):
            values.read(name, flag, default[1])


@pytest.mark.build
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('device = "CUDA9"', "invalid device: CUDA9; here it has "),
        ('spec_draft_device = "none,Vulkan9"', "invalid device: none; here it has "),
        ('mmproj_device = "gpu"', "invalid device: gpu; here it has "),
        ('override_tensor = "exps=CUDA9"', "unknown buffer type; Available buffer types: CPU"),
        (
            'json_schema = \'{"type": "text"}\'',
            "JSON schema conversion failed: JSON schema error at #: unrecognized type text",
        ),
        ("chat_template = '{% if %}'", "the template is not supported"),
        ("chat_template = '{% if %}'\nno_jinja = true", ""),  # may be a name
        ("chat_template = '{{ messages[0].content }}'", ""),
        ("chat_template_file = 'a.json'", ""),
        ("chat_template_file = 'broken.jinja'", "the template is not supported"),
        ('json_schema_file = "a.json"', "[json.exception.parse_error.101] parse error at line 1"),
        ('json_schema = "{"', ""),  # is said as JSON that is none
        ('json_schema_file = "gone"', ""),  # as a file that is none
        ('device = "none"', ""),
        ('override_tensor = "exps=CPU"', ""),
        ('json_schema = \'{"type": "object"}\'', ""),
    ],
)
def test_what_the_real_program_alone_can_judge(
    built: Path, tmp_path: Path, text: str, why: str
) -> None:
    from pipeline.core.process import capture
    from pipeline.serve.config import instances
    from pipeline.serve.config.toml_form import load

    (server,) = built.glob("linux-*-cpu/llama-server")
    flags = parse_help(capture([server, "--help"]) or "")
    (tmp_path / "a.json").write_text("{a: 1}")
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m.content }}")
    (spec,) = load(written(tmp_path, SERVER + text)).specs
    resolved = instances.resolve(spec, flags)
    said = "".join(checks.refused(resolved, server, tmp_path, {"PATH": ""}))
    assert f": llama-server refuses it: {why}" in said if why else not said

"""This machine, parsed from the output of its tools and files. No effects: `probe` captures."""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct, field

from .nvidia import Card, parse_cards, parse_slices
from .probe import TIMEOUT, Facts, Machine, ProbeOutput

NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"
DISPLAY = "0x03"  # the class of a PCI device that is a graphics card begins with it
# What llama.cpp has code for; as Linux on x86, Linux on Arm and macOS spell it.
FEATURES = {
    "AVX2": ("avx2", "avx2_0"),
    "FMA": ("fma",),
    "F16C": ("f16c",),
    "AVX-512": ("avx512f",),
    "AVX-VNNI": ("avx_vnni",),
    "AVX512-VNNI": ("avx512_vnni", "avx512vnni"),
    "AVX512-BF16": ("avx512_bf16", "avx512bf16"),
    "AMX": ("amx_tile",),
    "NEON": ("asimd", "neon", "advsimd"),
    "DOTPROD": ("asimddp", "feat_dotprod"),
    "I8MM": ("i8mm", "feat_i8mm"),
    "BF16": ("bf16", "feat_bf16"),
    "SVE": ("sve",),
    "SVE2": ("sve2",),
    "SME": ("sme", "feat_sme"),
}
TOOLS = (
    *("CXX", "c++", "gcc", "g++", "clang", "clang++", "cl", "ccache", "node"),
    *("nvcc", "hipcc", "icpx", "glslc"),
)
# Compute capability of NVIDIA's small computers, whose nvidia-smi is missing or says little.
JETSONS = {
    "thor": "11.0",
    "orin": "8.7",
    "xavier": "7.2",
    "tx2": "6.2",
    "nano": "5.3",
    "tx1": "5.3",
}


class Tool(Struct, frozen=True, kw_only=True):
    """An installed tool."""

    path: str
    version: str


class VulkanDevice(Struct, frozen=True, kw_only=True):
    """A device of vulkaninfo's; `kind` such as DISCRETE_GPU or CPU, which is software."""

    name: str
    kind: str


class Host(Machine, frozen=True, kw_only=True):
    """The machine. `problems`: tools that hang or fail, by name, with a line each."""

    wsl: bool = False
    rosetta: bool = False
    jetson: str = ""
    cpu: str = ""
    features: tuple[str, ...] = ()
    tools: Mapping[str, Tool] = field(default_factory=dict)
    xcode: str = ""
    nvidia: tuple[Card, ...] = ()
    slices: tuple[str, ...] = ()
    amd: tuple[str, ...] = ()
    intel: tuple[str, ...] = ()
    apple: tuple[str, ...] = ()
    vulkan: tuple[VulkanDevice, ...] = ()
    has_vulkaninfo: bool = False
    vulkan_headers: str = ""
    vendors: frozenset[str] = frozenset()  # of the graphics cards on the PCI bus
    nvidia_driver: str = ""  # of the kernel, whether or not nvidia-smi answers
    problems: Mapping[str, str] = field(default_factory=dict)


def detect(facts: Facts) -> Host:
    """The machine that these facts describe."""
    outputs, files = facts.outputs, facts.files
    cpu, features = processor(facts)
    jetson = jetson_model(files.get("device-tree", ""))
    cards, slices, problems = nvidia(outputs)
    if jetson and not any(card.capability for card in cards):
        cards, problems = (jetson_card(jetson, files.get("tegra", "")),), {}
    for name in (*TOOLS, "rocminfo", "sycl-ls", "vulkaninfo", "system_profiler"):
        if fault := problem(outputs.get(name)):
            problems[name] = fault
    return Host(
        **{name: getattr(facts, name) for name in Machine.__struct_fields__},
        wsl="microsoft" in files.get("kernel", "").lower(),
        rosetta="sysctl.proc_translated: 1" in stdout_of(outputs, "sysctl", even_failed=True),
        jetson=jetson,
        cpu=cpu,
        features=features,
        tools={n: t for n in TOOLS if (t := tool(n, outputs.get(n)))},
        xcode=stdout_of(outputs, "xcode-select").strip(),
        nvidia=cards,
        slices=slices,
        amd=amd(stdout_of(outputs, "rocminfo")) or kfd(facts.kfd),
        intel=sycl(stdout_of(outputs, "sycl-ls")),
        apple=apple(stdout_of(outputs, "system_profiler")) if facts.system == "macos" else (),
        vulkan=vulkan_devices(stdout_of(outputs, "vulkaninfo")),
        has_vulkaninfo="vulkaninfo" in outputs,
        vulkan_headers=vulkan_headers(files.get("vulkan_core.h", "")),
        vendors=frozenset(vendor for vendor, kind in facts.pci if kind.startswith(DISPLAY)),
        nvidia_driver=kernel_driver(files.get("nvidia", "")),
        problems=problems,
    )


def stdout_of(outputs: Mapping[str, ProbeOutput], name: str, *, even_failed: bool = False) -> str:
    """The stdout of a tool, if it succeeded."""
    answer = outputs.get(name)
    return answer.out if answer and (even_failed or answer.status == 0) else ""


def problem(answer: ProbeOutput | None) -> str:
    """What is wrong with an installed tool; empty: nothing."""
    if answer is None or answer.status == 0:
        return ""
    if answer.hung:
        return f"gave no answer in {TIMEOUT} s"
    return first_line(answer.out + "\n" + answer.err) or f"ended with {answer.status}"


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def tool(name: str, answer: ProbeOutput | None) -> Tool | None:
    """A program that answered, with its version. Some say it far below or behind their names; the
    others have it in their first line, after what distributions put into brackets."""
    if answer is None or answer.status != 0:
        return None
    text = answer.out + "\n" + answer.err
    if name in ("hipcc", "icpx", "nvcc", "cl"):
        version = re.search(r"(?:HIP version:|Compiler|release|Version)\s+v?(\d+(?:\.\d+)+)", text)
    else:
        line = re.sub(r"\([^)]*\)", "", first_line(text))
        version = re.search(r"(\d+(?:\.\d+)+)", line) or re.search(r"(\d{4}\.\d+)", text)
    return Tool(path=answer.path, version=version[1] if version else first_line(text))


def processor(facts: Facts) -> tuple[str, tuple[str, ...]]:
    """The processor's name, and which of FEATURES it has."""
    text = facts.files.get("cpuinfo", "").partition("\n\n")[0]
    rows = dict(re.findall(r"^([^\n:]+?)\s*:[ \t]*(.*)$", text, re.M))
    name = rows.get("model name") or rows.get("Model") or facts.processor
    words = set(f"{rows.get('flags', '')} {rows.get('Features', '')}".lower().split())
    macos = stdout_of(facts.outputs, "sysctl", even_failed=True)
    values = dict(re.findall(r"^([\w.]+): (.*)$", macos, re.M))
    name = str(values.get("machdep.cpu.brand_string", name))
    for key, value in values.items():
        if key.startswith("hw.optional.") and value == "1":
            words.add(key.rpartition(".")[2].lower())
        elif key.endswith("features"):
            words |= set(value.lower().split())
    return name.strip(), tuple(f for f, spelled in FEATURES.items() if words & set(spelled))


def nvidia(
    outputs: Mapping[str, ProbeOutput],
) -> tuple[tuple[Card, ...], tuple[str, ...], dict[str, str]]:
    """Cards, MIG slices, and what nvidia-smi printed instead of them."""
    answer = outputs.get("nvidia-smi")
    if answer is None:
        return (), (), {}
    cards = parse_cards(stdout_of(outputs, "nvidia-smi"))
    cards = cards or parse_cards(stdout_of(outputs, "nvidia-smi, old"))
    if cards:
        return tuple(cards), tuple(parse_slices(stdout_of(outputs, "nvidia-smi -L"))), {}
    fault = problem(answer) or first_line(answer.out + "\n" + answer.err)
    return (), (), {"nvidia-smi": fault or "printed nothing"}


# Graphics cards and headers, from the tools and files of each vendor


def kernel_driver(text: str) -> str:
    """The version in /proc/driver/nvidia/version."""
    version = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)", text)
    return version[1] if version else ""


def jetson_model(text: str) -> str:
    """The device tree's model, where it is one of NVIDIA's; the text ends with a NUL."""
    model = text.strip("\0\n ")
    return model if "jetson" in model.lower() or model.lower().startswith("nvidia") else ""


def jetson_card(model: str, release: str) -> Card:
    """The GPU of such a computer; its driver is that of the system's release."""
    capability = next((c for word, c in JETSONS.items() if word in model.lower()), "")
    version = re.search(r"R(\d+).*?REVISION: ([\d.]+)", release)
    return Card(
        name=model,
        capability=capability,
        driver=f"L4T {version[1]}.{version[2]}" if version else "",
    )


def amd(text: str) -> tuple[str, ...]:
    """rocminfo's graphics agents: name and architecture."""
    agents = []
    for agent in re.split(r"^\*+\s*\nAgent \d+", text, flags=re.M):
        name = re.search(r"^\s+Name:\s+(gfx\w+)", agent, re.M)
        market = re.search(r"^\s+Marketing Name:\s+(\S.*?)\s*$", agent, re.M)
        if name:
            agents.append(f"{market[1]} ({name[1]})" if market else name[1])
    return tuple(agents)


def kfd(nodes: tuple[str, ...]) -> tuple[str, ...]:
    """AMD's cards by the kernel's numbers: 90010 is gfx90a, 110000 gfx1100; 0 is the processor."""
    names = []
    for text in nodes:
        version = re.search(r"^gfx_target_version (\d+)", text, re.M)
        if version and int(version[1]):
            number = int(version[1])
            names.append(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return tuple(names)


def sycl(text: str) -> tuple[str, ...]:
    """Level Zero's graphics devices of sycl-ls; OpenCL lists the same ones again."""
    pattern = (
        r"^\[(?:ext_oneapi_)?level_zero:gpu[^\]]*\](?:\[[^\]]*\])?\s+[^,]*,\s*(.+?)\s+[\d.]+\s*\["
    )
    return tuple(re.findall(pattern, text, re.M))


def apple(text: str) -> tuple[str, ...]:
    """system_profiler's GPUs, with the version of Metal that they support."""
    units = []
    for unit in re.split(r"^\s+Chipset Model: ", text, flags=re.M)[1:]:
        metal = re.search(r"^\s+Metal(?: Support| Family)?: (?:Supported, )?(.+?)\s*$", unit, re.M)
        name = unit.partition("\n")[0].strip()
        units.append(f"{name} ({metal[1]})" if metal else name)
    return tuple(units)


def vulkan_devices(text: str) -> tuple[VulkanDevice, ...]:
    """The devices of `vulkaninfo --summary`."""
    kinds = re.findall(r"^\s*deviceType\s*=\s*(?:PHYSICAL_DEVICE_TYPE_)?(\w+)", text, re.M)
    names = re.findall(r"^\s*deviceName\s*=\s*(.+?)\s*$", text, re.M)
    return tuple(
        VulkanDevice(name=name, kind=kind) for name, kind in zip(names, kinds, strict=False)
    )


def vulkan_headers(text: str) -> str:
    """The version of vulkan_core.h, such as 1.3.239."""
    patch = re.search(r"#define VK_HEADER_VERSION (\d+)", text)
    whole = re.search(
        r"#define VK_HEADER_VERSION_COMPLETE VK_MAKE_(?:API_)?VERSION\((?:0, ?)?(\d+), ?(\d+),",
        text,
    )
    return f"{whole[1]}.{whole[2]}.{patch[1]}" if patch and whole else ""

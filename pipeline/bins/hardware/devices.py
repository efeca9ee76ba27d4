"""Graphics cards and their headers, as the tools and files of each maker tell of them."""

from __future__ import annotations

import re

from msgspec import Struct

from .nvidia import Card

# Compute capability of NVIDIA's small computers, whose nvidia-smi is missing or says little.
JETSONS = {
    "thor": "11.0",
    "orin": "8.7",
    "xavier": "7.2",
    "tx2": "6.2",
    "nano": "5.3",
    "tx1": "5.3",
}


class VulkanDevice(Struct, frozen=True, kw_only=True):
    """A device of vulkaninfo's; `kind` such as DISCRETE_GPU or CPU, which is software."""

    name: str
    kind: str


def kernel_driver(text: str) -> str:
    """The version in /proc/driver/nvidia/version."""
    version = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)", text)
    return version[1] if version else ""


def jetson_model(text: str) -> str:
    """The device tree's model, where it is one of NVIDIA's; the text ends with a NUL."""
    model = text.strip("\0\n ")
    return model if "jetson" in model.lower() or model.lower().startswith("nvidia") else ""


def jetson_card(model: str, release: str) -> Card:
    """The graphics unit of such a computer; its driver is that of the system's release."""
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
    """The same from the kernel: 90010 is gfx90a, 110000 is gfx1100; 0 is the processor."""
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
    """system_profiler's graphics units, with the Metal that they speak."""
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

"""`doctor`: this machine, and what each backend lacks. It can be pasted into a bug report."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from msgspec import to_builtins
from msgspec.structs import replace

from pipeline.bins.compile import source
from pipeline.bins.compile.active import SHORT, Revision
from pipeline.bins.hardware.detect import Host, Tool, detect
from pipeline.bins.hardware.probe import probe
from pipeline.bins.hardware.providers import PACKAGES, provider
from pipeline.bins.hardware.requirements import MISSING, USABLE, Missing, reports
from pipeline.core.packages import installed
from pipeline.core.sandbox import strength
from pipeline.core.text import size

from .session import Session

WIDTH = 10  # of the first column
STATES = {USABLE: "usable", MISSING: "not usable; missing:"}


def doctor(session: Session) -> None:
    """Print what this machine has: text, or one JSON document with format=json."""
    host = hidden(detect(probe(session.home)), hider(session.home.root))
    report = document(host, source.active_revision(session.home))
    print(json.dumps(report, indent=1) if session.request.json else "\n".join(lines(report)))


def hider(home: Path) -> Callable[[str], str]:
    """A function that hides in a text what identifies the machine: homes, users, the host."""
    node = platform.node()
    folders = {str(Path.home()): "~", str(home): "$LLAMA_PIPELINE_HOME"}
    names = dict.fromkeys(users(), "USER") | dict.fromkeys((node, node.partition(".")[0]), "HOST")

    def hide(text: str) -> str:
        for folder, shown in sorted(folders.items(), key=lambda item: -len(item[0])):
            if len(folder) > 1:  # not / alone
                text = text.replace(folder, shown)
        for name, shown in names.items():
            if name:
                text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", shown, text)
        return text

    return hide


def users() -> set[str]:
    """The user's names: the system's, and what the environment says."""
    import psutil

    names = {os.environ.get(name, "") for name in ("LOGNAME", "USER", "USERNAME")}
    own = psutil.Process().username().rpartition("\\")[2]  # Windows puts the domain before it
    return names | ({own} if not own.isdecimal() else set())  # a number where it has no name


def hidden(host: Host, hide: Callable[[str], str]) -> Host:
    """The machine, without names in what programs print and users set."""
    return replace(
        host,
        name=hide(host.name),
        cxx=hide(host.cxx),
        xcode=hide(host.xcode),
        tools={
            name: Tool(path=hide(tool.path), version=hide(tool.version))
            for name, tool in host.tools.items()
        },
        problems={name: hide(text) for name, text in host.problems.items()},
    )


def document(host: Host, llama_cpp: Revision) -> dict[str, Any]:
    """The report as plain values. Sizes in bytes."""
    return {
        "pipeline": {
            "llama_cpp": llama_cpp.commit,
            "llama_cpp_name": llama_cpp.name,
            "python": platform.python_version(),
            "doit": version("doit"),
        },
        "system": {
            "name": host.name,
            "platform": f"{host.system}-{host.machine}",
            "wsl": host.wsl,
            "rosetta": host.rosetta,
            "jetson": host.jetson or None,
        },
        "cpu": {
            "model": host.cpu,
            "features": list(host.features),
            "cores": host.cores,
            "threads": host.threads,
        },
        "memory": {"total_bytes": host.memory, "available_bytes": host.memory_free},
        "disk": {"free_bytes": host.disk_free},
        "devices": {
            "nvidia": [
                {
                    "name": card.name,
                    "compute_capability": card.capability or None,
                    "memory_bytes": card.total or None,
                    "driver": card.driver or None,
                    "mig": card.split,
                }
                for card in host.nvidia
            ],
            "mig_slices": list(host.slices),
            "amd": list(host.amd),
            "intel": list(host.intel),
            "apple": list(host.apple),
            "vulkan": [to_builtins(device) for device in host.vulkan],
        },
        "sandbox": to_builtins(strength()),
        "tools": {
            **{name: to_builtins(tool) for name, tool in host.tools.items()},
            **{name: {"path": None, "version": version} for name, version in wheels().items()},
        },
        "vulkan_headers": host.vulkan_headers or None,
        "xcode": host.xcode or None,
        "parts": sorted(host.parts),
        "problems": dict(host.problems),
        "backends": {
            report.backend: {
                "state": report.state,
                "missing": [missing_entry(item, host) for item in report.missing],
                "notes": list(report.notes),
            }
            for report in reports(host)
        },
    }


def wheels() -> dict[str, str]:
    """The tools that are Python packages; the container's image has none."""
    return {name: version for name in ("cmake", "ninja") if (version := installed(name))}


def missing_entry(item: Missing, host: Host) -> dict[str, Any]:
    """What is missing: the command for this system, and for the others."""
    return {
        "what": item.what,
        "install": provider(item.package, host.system, host.family) or None,
        "packages": dict(PACKAGES.get(item.package, {})),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The document as people read it."""
    system, cpu, memory = report["system"], report["cpu"], report["memory"]
    kinds = [name.upper() for name in ("wsl", "rosetta") if system[name]]
    yield row("system", ", ".join([system["name"], system["platform"], *kinds]))
    if system["jetson"]:
        yield row("", system["jetson"])
    yield row(
        "cpu",
        f"{cpu['model'] or 'unknown'}, {cpu['cores'] or 'unknown'} cores, "
        f"{cpu['threads'] or 'unknown'} threads",
    )
    yield row("", " ".join(cpu["features"]) or "features unknown")
    yield row(
        "memory", f"{size(memory['total_bytes'])}, {size(memory['available_bytes'])} available"
    )
    yield row("disk", f"{size(report['disk']['free_bytes'])} free in the home")
    unlimited = strength().lacks
    yield row(
        "sandbox",
        report["sandbox"]["name"] + (f"; it cannot limit {unlimited}" if unlimited else ""),
    )
    yield from block("devices", device_lines(report["devices"]))
    tools = [
        f"{name} {tool['version']} ({tool['path'] or 'its wheel'})"
        for name, tool in report["tools"].items()
    ]
    if report["vulkan_headers"]:
        tools.append(f"Vulkan headers {report['vulkan_headers']}")
    if report["xcode"]:
        tools.append(f"Xcode tools ({report['xcode']})")
    yield from block("tools", tools)
    pipeline = report["pipeline"]
    yield row(
        "pipeline",
        f"llama.cpp {pipeline['llama_cpp_name']} {pipeline['llama_cpp'][:SHORT]}, "
        f"Python {pipeline['python']}, doit {pipeline['doit']}",
    )
    yield from block("problems", [f"{name}: {text}" for name, text in report["problems"].items()])
    for name, answer in report["backends"].items():
        yield row(name, STATES[answer["state"]])
        for item in answer["missing"]:
            yield row("", item["what"] + (f": {item['install']}" if item["install"] else ""))
        for note in answer["notes"]:
            yield row("", f"note: {note}")


def device_lines(devices: dict[str, Any]) -> list[str]:
    """One line for each card, or one that there is none."""
    entries = []
    for card in devices["nvidia"]:
        words = [card["name"]]
        words += [f"compute capability {card['compute_capability'] or 'unknown'}"]
        words += [size(card["memory_bytes"])] if card["memory_bytes"] else ["memory unknown"]
        words += [f"driver {card['driver'] or 'unknown'}", *(["MIG"] if card["mig"] else [])]
        entries.append(", ".join(words))
    entries += [f"MIG slice {name}" for name in devices["mig_slices"]]
    entries += [name for maker in ("amd", "intel", "apple") for name in devices[maker]]
    entries += [f"Vulkan: {device['name']}, {device['kind']}" for device in devices["vulkan"]]
    return entries or ["no GPU answers"]


def block(title: str, texts: list[str]) -> Iterator[str]:
    yield from (row("" if number else title, text) for number, text in enumerate(texts))


def row(title: str, text: str) -> str:
    return f"{title:<{WIDTH}} {text}"

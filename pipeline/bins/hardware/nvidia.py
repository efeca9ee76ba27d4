"""The NVIDIA cards of this machine and their memory, from their driver."""

from __future__ import annotations

import platform
import re
import shutil
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from pipeline.core.process import capture, outcome

FORM = "--format=csv,noheader,nounits"
MEMORY_QUERY = ("--query-gpu=name,memory.total,memory.free", FORM)
CARD_QUERY = ("--query-gpu=name,compute_cap,driver_version,mig.mode.current,memory.total", FORM)
OLD_CARD_QUERY = ("--query-gpu=name,driver_version,memory.total", FORM)  # before driver 510
USED_QUERY = ("--query-compute-apps=pid,gpu_uuid,used_memory", FORM)
FIGURE = re.compile(r"\d+|\[N/A\]|\[Not Supported\]")
SECONDS = 10.0  # for nvidia-smi to answer
MIB = 1024 * 1024
DRIVER_LIBRARY = "libcuda.so.1"
# As ldconfig marks them; those of other programs on the same machine (32 bits) are left out.
LDCONFIG_MARKS = {"x86_64": "x86-64", "aarch64": "AArch64"}
# Where it may lie although ldconfig does not list it: WSL, NixOS.
DRIVER_FOLDERS = ("/usr/lib/wsl/lib", "/run/opengl-driver/lib")


class Card(Struct, frozen=True, kw_only=True):
    """A card. What was not queried, or the driver does not report, is empty or 0."""

    name: str
    capability: str = ""  # such as 8.9
    driver: str = ""
    total: int = 0  # bytes of its memory
    free: int = 0
    split: bool = False  # MIG is on: programs see its slices, not the card


def count() -> int | None:
    """How many cards there are; None where no driver of NVIDIA's is here, or answers in time."""
    cards = _asked()
    return None if cards is None else len(cards)


def parse(text: str) -> list[Card]:
    """The cards in the lines of MEMORY_QUERY, those without figures among them, such as a GB10,
    whose memory is the machine's; other lines are left out."""
    cards = []
    for line in text.splitlines():
        name, *memory = _words(line, 3)
        if not name or len(memory) != 2 or not all(map(FIGURE.fullmatch, memory)):
            continue
        total, free = (int(word) * MIB if word.isdecimal() else None for word in memory)
        if total is None or free is None:
            total = free = 0
        cards.append(Card(name=name, total=total, free=free))
    return cards


def _words(line: str, count: int) -> list[str]:
    """The values in a line of nvidia-smi's; the first one, a name, may contain commas."""
    return [word.strip() for word in line.rsplit(",", count - 1)]


def parse_cards(text: str) -> list[Card]:
    """The lines of CARD_QUERY or OLD_CARD_QUERY. A line without a driver's version is not a card:
    errors are printed in their place, with status 0 too."""
    cards = []
    for line in text.splitlines():
        words = _words(line, 5)
        if len(words) == 5 and re.fullmatch(r"\d+(\.\d+)+", words[2]):
            name, capability, driver, split, total = words
        else:
            words = _words(line, 3)
            if len(words) < 3 or not re.fullmatch(r"\d+(\.\d+)+", words[1]):
                continue
            (name, driver, total), capability, split = words, "", ""
        cards.append(
            Card(
                name=name,
                capability=capability if re.fullmatch(r"\d+\.\d+", capability) else "",
                driver=driver,
                total=int(total) * MIB if total.isdecimal() else 0,
                split=split == "Enabled",
            )
        )
    return cards


def parse_slices(text: str) -> list[str]:
    """The MIG slices that `nvidia-smi -L` lists: their profiles, such as `1g.10gb`."""
    return re.findall(r"^\s+MIG (\S+)\s+Device", text, re.M)


def ids() -> list[str]:
    """The ids by which CUDA_VISIBLE_DEVICES names the cards and slices; none without a driver."""
    program = shutil.which("nvidia-smi")
    status, out, _ = outcome([program, "-L"], timeout=SECONDS) if program else (-1, "", "")
    return re.findall(r"\(UUID: ((?:GPU|MIG)-[\w/-]+)\)", out) if status == 0 else []


def find() -> list[Card]:
    """The cards whose memory nvidia-smi lists; none where it is missing, fails or hangs."""
    return [card for card in listed() if card.total]


def listed() -> list[Card]:
    """All cards that it lists, in their order."""
    return _asked() or []


def shared() -> set[str]:
    """The cards whose memory is the machine's, by slot: `gpu0` and so on."""
    return {f"gpu{index}" for index, card in enumerate(listed()) if not card.total}


def _asked() -> list[Card] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    status, out, err = outcome([program, *MEMORY_QUERY], timeout=SECONDS)
    if status == -1 and "timed out" in err:
        return None
    return parse(out) if status == 0 else []


def used() -> dict[int, dict[str, int]]:
    """Bytes that each process uses, by card: `gpu0` and so on; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return {}
    cards = (capture(["nvidia-smi", "--query-gpu=uuid", FORM], timeout=5) or "").split()
    by_process: dict[int, dict[str, int]] = {}
    for line in (capture(["nvidia-smi", *USED_QUERY], timeout=5) or "").splitlines():
        with suppress(ValueError):  # "[N/A]"
            pid, uuid, mib = (word.strip() for word in line.split(","))
            on_cards = by_process.setdefault(int(pid), {})
            name = f"gpu{cards.index(uuid)}"
            on_cards[name] = on_cards.get(name, 0) + int(mib) * MIB
    return by_process


def driver_library() -> Path | None:
    """The driver's library on this machine."""
    listed = listed_libraries(capture(["/sbin/ldconfig", "-p"]) or "", platform.machine())
    others = [Path(folder, DRIVER_LIBRARY) for folder in DRIVER_FOLDERS]
    return next((path for path in (*listed, *others) if path.is_file()), None)


def listed_libraries(text: str, machine: str) -> list[Path]:
    """The paths of the driver's library that `ldconfig -p` lists for programs of this machine."""
    paths = []
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        mark, _, path = rest.partition(" => ")
        if name == DRIVER_LIBRARY and LDCONFIG_MARKS.get(machine, machine) in mark:
            paths.append(Path(path))
    return paths

"""For which platform a program was made, by its first bytes."""

from __future__ import annotations

from pathlib import Path

ELF = {0x03: "x86", 0x28: "arm", 0x3E: "x64", 0xB7: "arm64", 0xF3: "riscv64", 0x15: "ppc64"}
PE = {0x014C: "x86", 0x8664: "x64", 0xAA64: "arm64"}
MACH_O = {0x01000007: "x64", 0x0100000C: "arm64"}


def platform_of(program: Path) -> str:
    """As `host.platform_tag` says it, such as `windows-x64`; "" for what is none of them."""
    with program.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"\x7fELF"):
        machine = int.from_bytes(head[18:20], "big" if head[5:6] == b"\x02" else "little")
        return f"linux-{ELF.get(machine, hex(machine))}"
    if head.startswith(b"MZ"):
        start = int.from_bytes(head[0x3C:0x40], "little")
        machine = int.from_bytes(head[start + 4 : start + 6], "little")
        return f"windows-{PE.get(machine, hex(machine))}"
    if head.startswith(b"\xcf\xfa\xed\xfe"):
        machine = int.from_bytes(head[4:8], "little")
        return f"macos-{MACH_O.get(machine, hex(machine))}"
    if head.startswith(b"\xca\xfe\xba\xbe"):
        return "macos"
    return ""

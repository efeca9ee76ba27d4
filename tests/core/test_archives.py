"""Archives as an enemy writes them, in each format that can say it."""

from __future__ import annotations

import gzip
import io
import os
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from core_tools import child, finish, names

from pipeline.core import archives
from pipeline.core import members as rules
from pipeline.core.archives import members, unpack
from pipeline.core.errors import PipelineError
from pipeline.core.members import judge, path_of

TYPES = {
    "file": (tarfile.REGTYPE, stat.S_IFREG),
    "folder": (tarfile.DIRTYPE, stat.S_IFDIR),
    "symlink": (tarfile.SYMTYPE, stat.S_IFLNK),
    "char device": (tarfile.CHRTYPE, stat.S_IFCHR),
    "block device": (tarfile.BLKTYPE, stat.S_IFBLK),
    "fifo": (tarfile.FIFOTYPE, stat.S_IFIFO),
}


@dataclass
class Entry:
    """What is to be written, however wrong."""

    name: str
    data: bytes = b"content"
    kind: str = "file"
    mode: int = 0o644


def link(name: str, to: str) -> Entry:
    return Entry(name, to.encode(), "symlink", 0o777)


def write_tar(path: Path, entries: list[Entry]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.mode = TYPES[entry.kind][0], entry.mode
            if entry.kind == "symlink":
                info.linkname = entry.data.decode()
            info.size = len(entry.data) if entry.kind == "file" else 0
            tar.addfile(info, io.BytesIO(entry.data) if info.size else None)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def write_zip(path: Path, entries: list[Entry]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in entries:
            info = zipfile.ZipInfo("x")
            info.filename = entry.name + "/" * (entry.kind == "folder")
            info.create_system = 3
            info.external_attr = (TYPES[entry.kind][1] | entry.mode) << 16
            archive.writestr(info, b"" if entry.kind == "folder" else entry.data)
    return path


def write(path: Path, entries: list[Entry]) -> Path:
    return (write_zip if path.suffix == ".zip" else write_tar)(path, entries)


GOOD = [
    Entry("README.md"),
    Entry("bin", kind="folder", mode=0o2775),
    Entry("bin/llama-server", b"#!", mode=0o750),
    Entry("bin/libggml.so.0.9", b"library", mode=0o755),
    link("bin/libggml.so.0", "libggml.so.0.9"),
    link("bin/libggml.so", "../bin/./libggml.so.0"),
    Entry("bin/größe ü", b"", mode=0o600),
]
endings = pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".zip"])
both = pytest.mark.parametrize("ending", [".tar.gz", ".zip"])


def refused(archive: Path, match: str) -> PipelineError:
    """It is refused, and the folder is as it was."""
    before = names(archive.parent)
    with pytest.raises(PipelineError, match=match) as caught:
        unpack(archive, archive.parent / "out")
    assert names(archive.parent) == before
    assert archive.name in caught.value.message
    return caught.value


@endings
@pytest.mark.parametrize("before", ["", "./", "llama-b123/"])
def test_what_is_good_is_unpacked(tmp_path: Path, ending: str, before: str) -> None:
    entries = [Entry(before + entry.name, entry.data, entry.kind, entry.mode) for entry in GOOD]
    archive, target = write(tmp_path / f"mein ärchiv{ending}", entries), tmp_path / "aus gepackt"
    old = os.umask(0o077)
    try:
        made = unpack(archive, target)
    finally:
        os.umask(old)
    files = [entry.name for entry in GOOD if entry.kind != "folder"]
    target = target / before
    assert made == sorted(target / name for name in files)
    assert {path.name: path.read_bytes() for path in made} == {
        "README.md": b"content",
        "llama-server": b"#!",
        "größe ü": b"",
        **dict.fromkeys(("libggml.so", "libggml.so.0", "libggml.so.0.9"), b"library"),
    }
    if os.name != "nt":
        assert {path.name for path in made if path.is_symlink()} == {"libggml.so", "libggml.so.0"}
        assert str((target / "bin" / "libggml.so").readlink()) == "libggml.so.0.9"
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (target, *made)}
        assert {modes.pop(name) for name in ("README.md", "größe ü")} == {0o644}
        assert set(modes.values()) == {0o755}


@both
def test_a_top_folder_is_kept(tmp_path: Path, ending: str) -> None:
    archive = write(tmp_path / f"a{ending}", [Entry("top/a/b"), Entry("top/c")])
    assert unpack(archive, tmp_path / "kept") == [
        tmp_path / "kept" / "top" / name for name in ("a/b", "c")
    ]


HOSTILE = {
    "absolute": ([Entry("/etc/passwd")], "'/etc/passwd' is an absolute path"),
    "drive": ([Entry("C:/evil")], "is an absolute path"),
    "drive and backslash": ([Entry("C:\\evil")], "is an absolute path"),
    "UNC": ([Entry("\\\\host\\share")], "is an absolute path"),
    "backslash": ([Entry("bin\\..\\..\\evil")], "has .* in its name, which Windows"),
    "stream": ([Entry("bin/a:b")], "has : in its name"),
    "up": ([Entry("../evil")], r"'\.\./evil' leads out of the archive"),
    "up within": ([Entry("bin/../../evil")], "leads out of the archive"),
    "up and down": ([Entry("bin/../evil")], "leads out of the archive"),
    "top as a file": ([Entry("./.")], "has no name"),
    "line feed": ([Entry("a\nb")], "control characters"),
    "escape": ([Entry("a\x1b[2Jb")], r"'a\\x1b\[2Jb' has control"),
    "device name": ([Entry("bin/NUL")], r"Windows device \(NUL\)"),
    "device name with ending": ([Entry("con .txt")], "Windows device"),
    "device folder": ([Entry("lpt1/a")], "Windows device"),
    "dot at end": ([Entry("bin./a")], "ends in a dot"),
    "space at end": ([Entry("a ")], "ends in a dot or a space"),
    "long part": ([Entry("ü" * 128)], "longer than 255 bytes"),
    "long path": ([Entry("a" * 200 + "/" + "/".join(["b" * 200] * 5))], "longer than 1024"),
    "char device": ([Entry("null", b"", "char device")], "is a device"),
    "block device": ([Entry("sda", b"", "block device")], "is a device"),
    "fifo": ([Entry("pipe", b"", "fifo")], "a fifo"),
    "setuid": ([Entry("su", mode=0o4755)], "setuid"),
    "setgid": ([Entry("su", mode=0o2755)], "setuid or setgid"),
    "twice": ([Entry("a"), Entry("./a")], "is in the archive twice"),
    "folder twice": ([Entry("a", kind="folder")] * 2, "is in the archive twice"),
    "letter case": ([Entry("bin/A"), Entry("bin/a")], "'bin/a' and 'bin/A' are the same name"),
    "letter case of folders": ([Entry("Bin/a"), Entry("bin/b")], "'bin/b' and 'Bin' are the same"),
    "accents": ([Entry("ü"), Entry("u\u0308")], "are the same name"),
    "sharp s": ([Entry("STRASSE"), Entry("straße")], "are the same name"),
    "file and folder": ([Entry("a"), Entry("a/b")], "'a/b' is inside 'a', which is not a folder"),
    "folder and file": ([Entry("a/b"), Entry("a")], "'a' is also a folder"),
    "link out": ([link("bin/a", "../../etc/passwd")], "leads out of the archive, to"),
    "absolute link": ([link("a", "/etc/passwd")], "leads out of the archive, to '/etc"),
    "windows link": ([link("a", "C:\\Windows")], "not a file in the archive"),
    "link to nothing": ([link("a", "b")], "is a link to 'b', which is not a file"),
    "link to the top": ([link("a", ".")], "is a link to ''"),
    "link to a folder": ([Entry("bin/x"), link("a", "bin")], "is a link to 'bin'"),
    "link to itself": ([link("a", "a")], "only to more links"),
    "links in a circle": ([link("a", "b"), link("b", "a")], "only to more links"),
    "chain out": ([link("a", "b"), link("b", "../b")], "leads out of the archive"),
    "chain through a link": (
        [Entry("d/x"), link("d/up", ".."), link("a", "d/up/../evil")],
        "'d/up' is a link to ''",
    ),
    "through a link": ([link("a", "/tmp"), Entry("a/evil")], "'a/evil' is inside 'a'"),
    "through a later link": ([Entry("a/evil"), link("a", "/tmp")], "'a' is also a folder"),
    "over a link": ([Entry("x"), link("a", "x"), Entry("a")], "is in the archive twice"),
    "nothing": ([], "contains no files"),
    "no file": ([Entry("bin", kind="folder")], "contains no files"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@both
@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_hostile_is_refused(tmp_path: Path, ending: str, case: str) -> None:
    entries, match = HOSTILE[case]
    refused(write(tmp_path / f"x{ending}", entries), match)
    if case not in ("nothing", "no file"):
        refused(write(tmp_path / f"y{ending}", [Entry("zz/good"), *entries]), match)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".zip"])
def test_one_bad_member_among_good_ones(tmp_path: Path, ending: str) -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 32)))
    print(f"TEST_SEED={seed}")
    dice = random.Random(seed)
    cases = sorted(HOSTILE.keys() - {"nothing", "no file"})
    for _ in range(40):
        good = [
            Entry(f"g{i}/{dice.choice('xyz')}{i}", dice.randbytes(dice.randrange(9000)))
            for i in range(dice.randrange(30))
        ]
        archive = write(tmp_path / f"x{ending}", [*good, Entry("one")])
        assert len(unpack(archive, tmp_path / "out")) == len(good) + 1
        for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "out").rmdir()
        bad, match = HOSTILE[dice.choice(cases)]
        place = dice.randrange(len(good) + 1)
        refused(write(archive, [*good[:place], *bad, *good[place:]]), match)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".zip"])
def test_any_damage_is_an_error_of_ours_or_none(tmp_path: Path, ending: str) -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 32)))
    print(f"TEST_SEED={seed}")
    dice = random.Random(seed)
    whole = write(tmp_path / f"whole{ending}", GOOD).read_bytes()
    archive, refusals = tmp_path / f"x{ending}", 0
    for i in range(400):
        data = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        archive.write_bytes(data)
        try:
            unpack(archive, tmp_path / f"out{i}")
        except PipelineError:
            refusals += 1
            assert not (tmp_path / f"out{i}").exists()
    assert refusals > 20


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".zip"])
def test_cut_short_anywhere_it_is_refused(tmp_path: Path, ending: str) -> None:
    whole = write(tmp_path / f"whole{ending}", GOOD).read_bytes()
    end = whole.rstrip(b"\0") if ending == ".tar" else whole
    # Cut between two members of a tar, tarfile itself sees no fault.
    for length in {*range(0, len(end), len(end) // 100), *range(0, len(end), 512)}:
        archive = tmp_path / f"x{ending}"
        archive.write_bytes(whole[:length])
        refused(archive, "damaged or cut short|by its content")
    for length in (
        {len(whole) // 512 * 512 - 512 * i for i in range(30)} if ending == ".tar" else ()
    ):
        if 512 < length <= len(end):  # between two members tarfile itself sees no fault
            archive.write_bytes(whole[:length])
            refused(archive, "damaged or cut short")


@endings
def test_garbage_behind_the_end_is_fine(tmp_path: Path, ending: str) -> None:
    archive = write(tmp_path / f"x{ending}", GOOD)
    for garbage in (b"\0" * 700, b"garbage" * 100):
        with archive.open("ab") as file:
            file.write(garbage)
        out = tmp_path / f"out{len(garbage)}{garbage[:1].hex()}"
        assert len(unpack(archive, out)) == 6


def test_a_wrong_checksum_of_gzip_is_damage(tmp_path: Path) -> None:
    archive = write(tmp_path / "x.tar.gz", GOOD)
    data = bytearray(archive.read_bytes())
    data[-6] ^= 1
    archive.write_bytes(data)
    refused(archive, "damaged or cut short: CRC")


@pytest.mark.parametrize(
    ("content", "name", "match"),
    [
        (".zip", "x.tar.gz", "by its name it is tar.gz, by its content zip"),
        (".tar", "x.tar.gz", "by its content tar"),
        (".tar.gz", "x.tar", "by its content tar.gz"),
        (".tar.gz", "x.zip", "by its content tar.gz"),
        (".tar.gz", "x", "by its name it is of no known format"),
        (".tar.gz", "x.gz", "by its name it is of no known"),
    ],
)
def test_name_and_content_must_agree(tmp_path: Path, content: str, name: str, match: str) -> None:
    refused(write(tmp_path / f"made{content}", GOOD).rename(tmp_path / name), match)


def test_what_is_no_archive(tmp_path: Path) -> None:
    for name, data in {"a.zip": b"", "b.tar": b"x" * 999, "c.tgz": b"\x7fELF"}.items():
        (tmp_path / name).write_bytes(data)
        assert ".tar.gz" in refused(tmp_path / name, "of no known format").hint
    (tmp_path / "d.tar.gz").write_bytes(gzip.compress(b"no tar" * 500))
    refused(tmp_path / "d.tar.gz", "damaged")
    refused(tmp_path / "missing.zip", "cannot be read: No such file")


@both
def test_limits(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write(tmp_path / f"x{ending}", [Entry(f"d/{i}", b"12345") for i in range(10)])
    monkeypatch.setattr(rules, "MOST_FILES", 10)
    refused(archive, "'d/9' .*10 files that are allowed")
    monkeypatch.setattr(rules, "MOST_FILES", 11)
    monkeypatch.setattr(rules, "MOST_BYTES", 49)
    refused(archive, "'d/9' makes it 50 B in total; allowed are 49 B")
    monkeypatch.setattr(rules, "MOST_BYTES", 50)
    assert len(unpack(archive, tmp_path / "out")) == 10
    deep = write(tmp_path / f"deep{ending}", [Entry("a/" * 99 + "b")])
    monkeypatch.setattr(rules, "MOST_FILES", 99)
    refused(deep, "files that are allowed")  # folders count


def test_links_count_as_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry("a", b"x" * 1000), *(link(f"l{i}", "a") for i in range(9))]
    archive = write(tmp_path / "x.tar.gz", entries)
    monkeypatch.setattr(rules, "MOST_BYTES", 9_999)
    refused(archive, "makes it 10.0 kB in total")
    monkeypatch.setattr(rules, "MOST_BYTES", 10_000)
    assert len(unpack(archive, tmp_path / "out")) == 10


def measured(archive: Path, match: str) -> None:
    """Refused, and with little memory."""
    tracemalloc.start()
    try:
        refused(archive, match)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_a_bomb_of_10_gb(tmp_path: Path) -> None:
    """One block of zeros, compressed once and repeated, is 10 GB in the blink of an eye."""
    info = tarfile.TarInfo("zeros")
    info.size = 10_000_000_000
    with (tmp_path / "x.tar.gz").open("wb") as file:
        file.write(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
        block = gzip.compress(bytes(10_000_000))
        for _ in range(1000):
            file.write(block)
    measured(tmp_path / "x.tar.gz", "'zeros' makes it 10.0 GB out of an archive of 9.. MB|10.0 MB")


def test_a_bomb_of_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(80_000_000))
    measured(tmp_path / "x.zip", "80.0 MB out of an archive of 77.. kB: more than 100 to 1")


def test_a_bomb_behind_the_end_of_the_tar(tmp_path: Path) -> None:
    archive = write(tmp_path / "x.tar", [Entry("a")])
    data = archive.read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data + bytes(90_000_000)))
    archive.unlink()
    measured(tmp_path / "x.tar.gz", "damaged or cut short: .* more bytes would have to be read")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_bomb_in_a_header(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, 50_000_000
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(50_000_000) + bytes(1024)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data))
    measured(tmp_path / "x.tar.gz", "damaged or cut short")


def test_headers_upon_headers(tmp_path: Path) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 512
    data = (info.tobuf(tarfile.GNU_FORMAT) + b"n" * 512) * 100_000
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data))
    measured(tmp_path / "x.tar.gz", "damaged or cut short")


def test_global_headers_do_not_pile_up(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for i in range(200):
            tar.fileobj.write(  # type: ignore[union-attr]
                tarfile.TarInfo.create_pax_global_header({f"key{i}": "v"})
            )
            tar.addfile(tarfile.TarInfo(f"file{i}"))
    refused(tmp_path / "x.tar.gz", "headers make no sense")


def test_the_list_of_a_zip_is_no_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(22_000):
            archive.writestr(f"{i:0150}", b"")
    refused(tmp_path / "x.zip", "which is too much")


def test_a_name_that_ends_early(tmp_path: Path) -> None:
    """zipfile itself takes what stands before the NUL."""
    archive = write(tmp_path / "x.zip", [Entry("aXevil")])
    archive.write_bytes(archive.read_bytes().replace(b"aXevil", b"a\0evil"))
    refused(archive, r"'a\\x00evil' has control characters")


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    archive = write(tmp_path / "x.tar", [Entry("aXevil")])
    with tarfile.open(archive, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("größe"))
    refused(archive, r"not UTF-8")


def test_two_names_for_one_member_of_a_zip(tmp_path: Path) -> None:
    archive = write(tmp_path / "x.zip", [Entry("innocent")])
    archive.write_bytes(archive.read_bytes().replace(b"innocent", b"../../ab", 1))
    refused(archive, "damaged or cut short: File name in directory")


def test_an_empty_name(tmp_path: Path) -> None:
    refused(write(tmp_path / "x.zip", [Entry("")]), "has no name")


@pytest.mark.parametrize("kind", [stat.S_IFSOCK, 0o150000])
def test_a_socket_and_the_unheard_of_in_a_zip(tmp_path: Path, kind: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("socket")
        info.external_attr = (kind | 0o644) << 16
        archive.writestr(info, b"")
    refused(tmp_path / "x.zip", "a socket")


def test_a_kind_of_tar_member_that_is_unheard_of(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("odd")
        info.type = b"Z"
        tar.addfile(info)
    refused(tmp_path / "x.tar", "not a file, folder or link")


def test_a_tar_file_with_holes(tmp_path: Path) -> None:
    """512 bytes there, 8 EB claimed."""
    info = tarfile.TarInfo("holes")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"00000000000\0", b"00000000000\0"
    header[483:495] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(header + bytes(1024))
    refused(tmp_path / "x.tar", "sparse file")


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((tarfile.REGTYPE, size) for size in (-1, -512, -(1 << 40))),
        *((tarfile.XHDTYPE, size) for size in (-512, -(1 << 40))),
    ],
)
def test_a_tar_member_of_negative_size(tmp_path: Path, kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("negative")
    info.type, info.size = kind, size
    good, other = (tarfile.TarInfo(name).tobuf() for name in ("good", "other"))
    data = good + info.tobuf(tarfile.GNU_FORMAT) + other + bytes(1024)
    (tmp_path / "x.tar").write_bytes(data)
    refused(tmp_path / "x.tar", "damaged|makes it")


def hard(name: str, to: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = tarfile.LNKTYPE, to, 0o644
    return info.tobuf()


@pytest.mark.parametrize(
    ("name", "to", "match"),
    [
        ("a", "/etc/passwd", "leads out"),
        ("bin/a", "../etc/passwd", "leads out"),
        ("a", "a", "only to more links"),
        ("a", "missing", "not a file in the archive"),
        ("a", "bin", "not a file in the archive"),
        ("bin/x", "bin/x", "is in the archive twice"),
    ],
)
def test_hard_links(tmp_path: Path, name: str, to: str, match: str) -> None:
    content = tarfile.TarInfo("bin/x").tobuf()
    (tmp_path / "x.tar").write_bytes(content + hard(name, to) + bytes(1024))
    refused(tmp_path / "x.tar", match)


def test_a_good_hard_link_becomes_a_copy(tmp_path: Path) -> None:
    archive = write(tmp_path / "x.tar", [Entry("bin/x", b"12345", mode=0o755)])
    data = archive.read_bytes()
    archive.write_bytes(data[:1024] + hard("bin/y", "./bin/x") + data[1024:])
    unpack(archive, tmp_path / "out")
    copy = tmp_path / "out" / "bin" / "y"
    assert copy.read_bytes() == b"12345"
    assert copy.stat().st_nlink == 1 and copy.stat().st_mode & 0o777 == 0o755


def patched(archive: Path, local: int, central: int, form: str, *values: int) -> Path:
    """Overwrite fields of the only member, in its own header and in the zip's list."""
    data = bytearray(archive.read_bytes())
    struct.pack_into(form, data, local, *values)
    struct.pack_into(form, data, data.index(b"PK\x01\x02") + central, *values)
    archive.write_bytes(data)
    return archive


def test_an_encrypted_member(tmp_path: Path) -> None:
    archive = write(tmp_path / "x.zip", [Entry("secret")])
    refused(patched(archive, 6, 8, "<H", 1), "'secret' is encrypted")


@pytest.mark.parametrize("method", [12, 14, 99])
def test_other_ways_to_pack(tmp_path: Path, method: int) -> None:
    archive = write(tmp_path / "x.zip", [Entry("packed")])
    refused(patched(archive, 8, 10, "<H", method), f"is packed by method {method}")


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("claimed", [10, 99, 101, 1 << 20])
def test_a_size_that_lies(tmp_path: Path, how: int, claimed: int) -> None:
    """With the checksum of what it claims, which is how a reader is deceived that stops there."""
    import zlib

    content = b"a" * 100
    with zipfile.ZipFile(tmp_path / "x.zip", "w", how) as archive:
        archive.writestr("liar", content)
    patched(tmp_path / "x.zip", 22, 24, "<I", claimed)
    refused(tmp_path / "x.zip", "does not have the|damaged or cut short")
    patched(tmp_path / "x.zip", 14, 16, "<I", zlib.crc32(content[:claimed]))
    refused(tmp_path / "x.zip", "does not have the|damaged or cut short")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "x.tar.gz", [Entry("small"), Entry("large", os.urandom(2_000_000))])
    script = """
import resource, sys
from pathlib import Path
from pipeline.core.archives import unpack
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
folder = Path(sys.argv[1])
try:
    unpack(folder / "x.tar.gz", folder / "out")
except OSError as error:
    assert not (folder / "out").exists()
    print(error)
else:
    raise SystemExit("it fitted")
"""
    with child(script, tmp_path) as process:
        finish(process)
    assert names(tmp_path) == ["x.tar.gz"]


def test_the_target_must_be_new(tmp_path: Path) -> None:
    archive = write(tmp_path / "x.zip", GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError):
        unpack(archive, tmp_path / "out")
    assert names(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("name", ["console", "nul2", "a.b.c", ".hidden", "...a", "com", "bin/x..y"])
def test_names_that_only_look_odd(name: str) -> None:
    assert path_of(f"./{name}//") == name


@pytest.mark.parametrize("other", [["a", "c"], ["a"], ["b", "a", "c"]])
def test_an_archive_that_changes_between_the_two_readings(tmp_path: Path, other: list[str]) -> None:
    """What is written is what was judged."""
    judged = write(tmp_path / "judged.tar", [Entry("a"), Entry("b")])
    written = write(tmp_path / "written.tar", [Entry(name) for name in other])
    contents = judge(judged, (member for member, _ in members(judged, "tar")), 1000)
    with pytest.raises(PipelineError, match="changed while the archive was read"):
        (tmp_path / "out").mkdir()
        archives._write(written, contents, members(written, "tar"), tmp_path / "out")

"""llama.cpp's page, with stand-ins for Node.js and npm that behave well and badly."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, wait_for
from msgspec.structs import replace

from pipeline.bins.compile import git_tree, node, source, web_ui
from pipeline.bins.compile.node import Node, find_node, is_accepted_node, require_node
from pipeline.bins.compile.source import Source
from pipeline.bins.compile.web_ui import Ui
from pipeline.core import packages
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.store import receipts

scripts = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
FILES = {
    "CMakeLists.txt": "project(x)\n",
    "tools/ui/package.json": "{}\n",
    "tools/ui/package-lock.json": '{"packages": {"": {}, "node_modules/a": {}}}\n',
    "tools/ui/svelte.config.js": "export default { kit: {} };\n",
    "tools/ui/src/app.css": "p {}\n",
}
PAGE = (
    *("index.html", "manifest.webmanifest", "sw.js", "build.json", "workbox-1.js"),
    *("_app/version.json", "_app/immutable/bundle.2.js", "_app/immutable/assets/bundle.3.css"),
)
# What npm does is written beside it; what it was called with, too.
NODE = shutil.which("node")
NPM = f"""#!/bin/sh
here=$(dirname "$0")
echo "$*" >>"$here/calls"
env >"$here/environment-$1"
pwd >"$here/pwd"
ls -A . >"$here/ls"
mode=$(cat "$here/mode")
if [ "$1" = ci ]; then
  echo "npm http cache a@https://host.invalid/a.tgz 0ms (cache hit)"
  case $mode in
    hang) echo "npm http fetch GET"; sleep 600 ;;
    drip) while sleep 0.1; do echo "npm http fetch GET"; done ;;
    fail) echo "npm error code ENOTFOUND"; exit 1 ;;
    full) echo "npm error nospc ENOSPC: no space left on device, write"; exit 228 ;;
  esac
  mkdir node_modules && exit 0
fi
[ "$mode" = broken ] && echo "Could not resolve ./gone.js" && exit 1
[ "$mode" = nothing ] && exit 0
[ "$mode" = wait ] && touch "$here/waits" && sleep 5
out=$LLAMA_UI_OUT_DIR
mkdir -p "$out/_app/immutable/assets"
for name in {" ".join(PAGE)}; do cat src/app.css svelte.config.js >"$out/$name"; done
[ "$mode" = incomplete ] && rm "$out/sw.js" "$out/_app/immutable/bundle.2.js"
[ "$mode" = empty ] && : >"$out/index.html"
exit 0
"""


class Tools:
    """A folder of PATH with a stand-in for node and one for npm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.node("v22.13.0")
        self.write("npm", NPM)
        self.mode("good")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def node(self, version: str) -> None:
        self.write("node", f"#!/bin/sh\necho {version}\n")

    def mode(self, mode: str) -> None:
        (self.folder / "mode").write_text(mode)

    def calls(self) -> list[str]:
        """The words of npm's calls since the last time."""
        book = self.folder / "calls"
        lines = book.read_text().splitlines() if book.exists() else []
        book.unlink(missing_ok=True)
        return lines

    def environment(self, command: str) -> dict[str, str]:
        lines = (self.folder / f"environment-{command}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    tools = Tools(tmp_path / "tools ü")
    monkeypatch.setenv("PATH", f"{tools.folder}{os.pathsep}{os.environ['PATH']}")
    return tools


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "mein häus")


@pytest.fixture
def origin(tmp_path: Path) -> Source:
    folder = tmp_path / "source ü"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Source(folder=folder, commit="c" * 40, tree="t" * 40, fetched=True)


@pytest.fixture
def plan(tools: Tools, origin: Source, home: Home) -> Ui:
    return Ui(source=origin, node=require_node(home), home=home)


def texts(folder: Path) -> dict[str, str]:
    return {name: path.read_text() for name, path in web_ui.page_files(folder).items()}


def leftovers(home: Home) -> list[str]:
    found = [*home.bins.rglob("*.part"), *home.bins.rglob("*.old"), *home.bins.rglob("node_mod*")]
    return [str(path) for path in found]


class TestNode:
    @pytest.mark.parametrize(
        ("version", "accepted"),
        [
            *(("", False), ("18.20.8", False), ("20.18.3", False), ("20.19.0", True)),
            *(("21.7.3", False), ("22.12.0", False), ("22.13.0", True), ("23.11.0", False)),
            *(("24.0.0", True), ("25.1.0", True), ("100.0.0", True)),
        ],
    )
    def test_accepted_versions(self, version: str, accepted: bool) -> None:
        assert is_accepted_node(version) is accepted

    @scripts
    def test_found(self, tools: Tools, home: Home) -> None:
        expected = Node(str(tools.folder / "node"), str(tools.folder / "npm"), "22.13.0")
        assert find_node(home) == require_node(home) == expected

    @scripts
    @pytest.mark.parametrize(
        ("version", "words"),
        [
            ("v18.20.8", "is version 18.20.8, and llama.cpp's page needs 20.19, 22.13, 24.0 or "),
            ("hello", "does not name its version"),
        ],
    )
    def test_too_old_or_no_node_at_all(
        self, tools: Tools, home: Home, version: str, words: str
    ) -> None:
        tools.node(version)
        assert find_node(home) is None
        with pytest.raises(PipelineError, match=words) as failure:
            require_node(home)
        assert "ui=off" in failure.value.hint

    @scripts
    @pytest.mark.parametrize(("gone", "words"), [("node", "Node.js is not"), ("npm", "npm is not")])
    def test_missing(
        self, tools: Tools, home: Home, monkeypatch: pytest.MonkeyPatch, gone: str, words: str
    ) -> None:
        (tools.folder / gone).unlink()
        monkeypatch.setenv("PATH", str(tools.folder))
        with pytest.raises(PipelineError, match=words):
            require_node(home)

    @scripts
    def test_a_script_is_asked_each_time(self, tools: Tools, home: Home) -> None:
        node = tools.folder / "node"
        stat = node.stat()
        assert require_node(home).version == "22.13.0"
        tools.node("v22.14.0")
        os.utime(node, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert require_node(home).version == "22.14.0"

    @pytest.mark.skipif(not NODE, reason="needs Node.js (apt install nodejs npm)")
    def test_a_program_is_asked_once(self, home: Home) -> None:
        assert find_node(home) is None or not home.root.exists(), "looking makes no home"
        home.run.mkdir(parents=True)
        before = find_node(home)
        if before is None:
            pytest.skip("this machine's Node.js is too old, or without npm")
        book = home.run / "node.json"
        book.write_text(book.read_text().replace(before.version, "99.0.0"))
        assert require_node(home).version == "99.0.0"

    @pytest.mark.skipif(not NODE, reason="needs Node.js (apt install nodejs npm)")
    def test_a_version_managers_program_is_asked_each_time(self, tools: Tools, home: Home) -> None:
        """A link to one program for all tools, which starts whatever version is chosen."""
        manager = tools.folder / "manager"
        shutil.copy(str(NODE), manager)
        (tools.folder / "node").unlink()
        (tools.folder / "node").symlink_to(manager)
        home.run.mkdir(parents=True)
        find_node(home)
        assert list(home.run.iterdir()) == []


@scripts
class TestChoose:
    def test_with_node(self, plan: Ui, origin: Source, home: Home) -> None:
        for wanted in ("auto", "on"):
            assert web_ui.choose(wanted, origin, home) == (plan, "")
        assert web_ui.choose("off", origin, home) == (None, "ui=off")

    def test_node_out_of_a_package(self, tools: Tools, origin: Source, home: Home) -> None:
        tools.node("v18.0.0")
        chosen, why = web_ui.choose("auto", origin, home)
        assert chosen and chosen.node == node.packaged(home) and why == ""

    @pytest.mark.parametrize("is_offline", [True, False])
    def test_without_node(
        self,
        tools: Tools,
        origin: Source,
        home: Home,
        monkeypatch: pytest.MonkeyPatch,
        is_offline: bool,
    ) -> None:
        tools.node("v18.0.0")
        if not is_offline:
            monkeypatch.setattr(node, "PLATFORMS", ("linux-riscv64",))
        monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(home.root / "cache"))
        chosen, why = web_ui.choose("auto", origin, home, offline=is_offline)
        assert chosen is None
        assert "is version 18.0.0" in why
        with pytest.raises(PipelineError, match="is version 18"):
            web_ui.choose("on", origin, home, offline=is_offline)

    def test_a_page_that_stands_needs_no_node(
        self, tools: Tools, plan: Ui, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(node, "PLATFORMS", ())
        web_ui.make(plan)
        tools.node("v18.0.0")
        chosen, why = web_ui.choose("auto", plan.source, plan.home)
        assert chosen is not None
        assert (
            web_ui.recipe(chosen) == web_ui.recipe(plan) and web_ui.is_current(chosen) and why == ""
        )
        other = replace(plan.source, tree="u" * 40)
        assert web_ui.choose("auto", other, plan.home)[0] is None
        with pytest.raises(PipelineError, match="is version 18"):
            web_ui.make(chosen, force=True)

    def test_a_source_without_a_page(self, tools: Tools, origin: Source, home: Home) -> None:
        shutil.rmtree(origin.folder / "tools")
        chosen, why = web_ui.choose("auto", origin, home)
        assert chosen is None and "there is no page" in why


class TestPlan:
    def test_the_recipe_names_everything(self, origin: Source, home: Home) -> None:
        plan = Ui(source=origin, node=Node("/n", "/npm", "24.0.0"), home=home)
        others = [
            replace(plan, source=replace(origin, tree="u" * 40)),
            replace(plan, source=replace(origin, commit="d" * 40)),
            replace(plan, node=Node("/n", "/npm", "24.0.1")),
        ]
        assert all(web_ui.recipe(other) != web_ui.recipe(plan) for other in others)
        moved = replace(plan, node=Node("/m", "/npm", "24.0.0"), home=Home(home.root / "x"))
        assert web_ui.recipe(moved) == web_ui.recipe(plan)
        assert web_ui.choose("off", origin, home) == (None, "ui=off")

    def test_what_is_demanded(self, tmp_path: Path) -> None:
        assert web_ui.missing_files(tmp_path / "none") == list(web_ui.DEMANDED)
        for name in PAGE:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        assert web_ui.missing_files(tmp_path) == []
        (tmp_path / "sw.js").write_text("")
        assert web_ui.missing_files(tmp_path) == ["sw.js"]

    @pytest.mark.build
    def test_llama_cpp_demands_the_same(self, built: Path) -> None:
        script = source.find(Home(built.parent)).folder / "scripts" / "ui-assets.cmake"
        text = script.read_text(encoding="utf-8")
        for wanted in web_ui.DEMANDED:
            asked = wanted.replace("*.", ".*\\\\.")
            assert f'STREQUAL "{wanted}"' in text or f'MATCHES "^{asked}$"' in text
        assert text.count("if(NOT found_") == len(web_ui.DEMANDED)


@scripts
class TestMake:
    def test_once(self, tools: Tools, plan: Ui, capsys: pytest.CaptureFixture[str]) -> None:
        before = git_tree.stamp(plan.source.folder)
        assert not web_ui.is_current(plan)
        web_ui.make(plan)
        assert web_ui.is_current(plan)
        assert sorted(web_ui.page_files(plan.target)) == sorted(PAGE)
        ci, build = tools.calls()
        assert ci.split()[:2] == ["ci", "--ignore-scripts"] and "--prefer-offline" in ci
        assert build == "run build"
        assert "built llama.cpp's page" in capsys.readouterr().err
        web_ui.make(plan)
        assert tools.calls() == []
        assert git_tree.stamp(plan.source.folder) == before, "the source is only read"
        assert leftovers(plan.home) == []

    def test_what_npm_sees(self, tools: Tools, plan: Ui, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NODE_ENV", "production")
        monkeypatch.setenv("VITE_PUBLIC_SERVER_ORIGIN", "elsewhere")
        monkeypatch.setenv("LLAMA_BUILD_NUMBER", "7")
        monkeypatch.setenv("npm_config_registry", "of the user")
        web_ui.make(plan)
        seen = tools.environment("run")
        assert not {"NODE_ENV", "VITE_PUBLIC_SERVER_ORIGIN", "LLAMA_BUILD_NUMBER"} & set(seen)
        assert seen["npm_config_registry"] == "of the user"
        assert seen["SOURCE_DATE_EPOCH"] == "0"
        assert Path(seen["LLAMA_UI_OUT_DIR"]).parent == plan.target.parent
        assert (tools.folder / "pwd").read_text().startswith(str(plan.home.bins))
        assert "svelte.config.upstream.js" in (tools.folder / "ls").read_text()
        made_of = git_tree.folder_hash(plan.source.folder / "tools" / "ui")
        assert f"name: '{made_of[:12]}'" in texts(plan.target)["index.html"]

    def test_only_the_registry_is_shown_credentials(
        self, tools: Tools, plan: Ui, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("NPM_TOKEN", "NODE_AUTH_TOKEN", "GITHUB_TOKEN", "HF_TOKEN"):
            monkeypatch.setenv(name, f"secret of {name}")
        monkeypatch.setenv("npm_config_registry", "https://user:secret@registry")
        web_ui.make(plan)
        fetches, builds = tools.environment("ci"), tools.environment("run")
        secret = {name for name, value in fetches.items() if "secret" in value}
        assert secret == {"NPM_TOKEN", "NODE_AUTH_TOKEN", "npm_config_registry"}
        assert not [name for name, value in builds.items() if "secret" in value]

    def test_redone_when_its_files_change(self, tools: Tools, plan: Ui) -> None:
        web_ui.make(plan)
        (plan.source.folder / "tools/ui/src/app.css").write_text("b {}\n")
        changed = replace(plan, source=replace(plan.source, tree="u" * 40))
        assert not web_ui.is_current(changed)
        tools.calls()
        web_ui.make(changed)
        assert len(tools.calls()) == 2 and web_ui.is_current(changed)
        assert texts(plan.target)["index.html"].startswith("b {}")

    def test_kept_when_other_files_change(self, tools: Tools, plan: Ui) -> None:
        web_ui.make(plan)
        (plan.source.folder / "CMakeLists.txt").write_text("project(y)\n")
        changed = replace(plan, source=replace(plan.source, tree="u" * 40, commit="d" * 40))
        assert not web_ui.is_current(changed)
        tools.calls()
        web_ui.make(changed)
        assert tools.calls() == [] and web_ui.is_current(changed)

    def test_redone_for_another_node_or_by_force(self, tools: Tools, plan: Ui) -> None:
        web_ui.make(plan)
        tools.node("v24.1.0")
        newer = replace(plan, node=require_node(plan.home))
        assert not web_ui.is_current(newer)
        tools.calls()
        web_ui.make(newer)
        assert len(tools.calls()) == 2
        web_ui.make(newer, force=True)
        assert len(tools.calls()) == 2

    def test_a_copied_page_is_kept_and_a_damaged_one_made_again(
        self, tools: Tools, plan: Ui
    ) -> None:
        web_ui.make(plan)
        tools.calls()
        index = plan.target / "index.html"
        os.utime(index, ns=(0, 0))
        assert not web_ui.is_current(plan)
        web_ui.make(plan)
        assert tools.calls() == [] and web_ui.is_current(plan)
        index.write_text("something else")
        assert not web_ui.is_current(plan)
        web_ui.make(plan)
        assert len(tools.calls()) == 2 and "p {}" in index.read_text()

    def test_clean_and_forget(self, tools: Tools, plan: Ui) -> None:
        web_ui.make(plan)
        web_ui.forget(plan.home)
        assert not web_ui.is_current(plan) and plan.target.is_dir()
        web_ui.clean(plan.home)
        assert not plan.target.exists()
        web_ui.clean(plan.home)
        assert receipts.load(plan.target.parent) == {}

    def test_what_git_ignores_is_no_part_of_it(self, tools: Tools, plan: Ui) -> None:
        folder = plan.source.folder
        (folder / ".gitignore").write_text("node_modules\n*.png\n")
        (folder / "tools/ui/node_modules").mkdir()
        (folder / "tools/ui/node_modules/a.js").write_text("a")
        (folder / "tools/ui/src/ü.png").write_text("a")
        (folder / "tools/ui/src/ö.js").write_text("a")
        subprocess.run(["git", "init", "--quiet", folder], check=True)
        module = replace(plan.source, fetched=False, local=True)
        found = source.files(module, "tools/ui")
        inside = [name.removeprefix("tools/ui/") for name in FILES if name.startswith("tools")]
        assert sorted(found) == sorted([*inside, "src/ö.js"])
        web_ui.make(replace(plan, source=module))
        assert len(tools.calls()) == 2


@scripts
class TestFailures:
    @pytest.mark.parametrize(
        ("mode", "message", "hint"),
        [
            ("fail", r"npm ci ended with 1\):\n(.*\n)*.*ENOTFOUND", "check the network"),
            ("full", r"npm ci ended with 228", "free some space"),
            ("broken", r"npm run ended with 1\):\n(.*\n)*.*gone.js", "the whole log is"),
            ("nothing", "built a page without index.html, manifest", "the whole log is"),
            ("incomplete", r"built a page without sw.js, bundle\*.js", "the whole log is"),
            ("empty", "built a page without index.html:", "the whole log is"),
        ],
    )
    def test_nothing_is_published(
        self, tools: Tools, plan: Ui, mode: str, message: str, hint: str
    ) -> None:
        tools.mode(mode)
        with pytest.raises(PipelineError, match=message) as failure:
            web_ui.make(plan)
        assert hint in failure.value.hint and "ui=off" in failure.value.hint
        assert not plan.target.exists() and leftovers(plan.home) == []
        tools.mode("good")
        web_ui.make(plan)
        before = texts(plan.target)
        tools.mode(mode)
        with pytest.raises(PipelineError):
            web_ui.make(plan, force=True)
        assert web_ui.is_current(plan) and texts(plan.target) == before, "the old page stays"

    def test_what_went_well_is_no_part_of_the_message(self, tools: Tools, plan: Ui) -> None:
        tools.mode("fail")
        with pytest.raises(PipelineError) as failure:
            web_ui.make(plan)
        assert "cache hit" in plan.log.read_text()
        assert "cache hit" not in failure.value.message

    def test_offline(self, tools: Tools, plan: Ui) -> None:
        tools.mode("fail")
        with pytest.raises(PipelineError) as failure:
            web_ui.make(plan, offline=True)
        assert "offline=1" in failure.value.hint
        assert "--offline" in tools.calls()[0]

    def test_a_network_that_says_nothing(
        self, tools: Tools, plan: Ui, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(node, "PATIENCE", 0.5)
        monkeypatch.setattr(packages, "LONGEST", 1.0)
        folder = tmp_path / "project"
        shutil.copytree(plan.source.folder / "tools/ui", folder)
        project = node.Project(folder, plan.node, tmp_path / "npm.log")
        for mode, why in (("hang", r"printed nothing for 0\.5 s"), ("drip", "not ended after 1 s")):
            tools.mode(mode)
            with pytest.raises(PipelineError, match=why):
                project.install()
            assert len(tools.calls()) == 1


MAKE = """
import sys
from pathlib import Path
from pipeline.bins.compile import web_ui as ui
from pipeline.bins.compile.node import require_node
from pipeline.bins.compile.source import Source
from pipeline.core.paths import Home
origin = Source(folder=Path(sys.argv[1]), commit="c" * 40, tree="t" * 40, fetched=True)
home = Home(Path(sys.argv[2]))
ui.make(ui.Ui(source=origin, node=require_node(home), home=home))
"""


@scripts
class TestTogether:
    @pytest.fixture
    def start(self, plan: Ui) -> Callable[[], subprocess.Popen[bytes]]:
        words = [sys.executable, "-c", MAKE, plan.source.folder, plan.home.root]
        return lambda: subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.DEVNULL)

    def test_killed(
        self, tools: Tools, plan: Ui, start: Callable[[], subprocess.Popen[bytes]]
    ) -> None:
        tools.mode("wait")
        with start() as process:
            wait_for((tools.folder / "waits").exists)
            process.send_signal(signal.SIGKILL)
        assert not web_ui.is_current(plan) and not plan.target.exists()
        tools.mode("good")
        web_ui.make(plan)
        assert web_ui.is_current(plan) and leftovers(plan.home) == []

    def test_two_at_once(
        self, tools: Tools, plan: Ui, start: Callable[[], subprocess.Popen[bytes]]
    ) -> None:
        tools.mode("wait")
        with start() as one, start() as other:
            assert one.wait(60) == other.wait(60) == 0
        assert len(tools.calls()) == 2 and web_ui.is_current(plan)


@scripts
class TestPlace:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "build"

    def test_only_what_changed(self, plan: Ui, folder: Path) -> None:
        with pytest.raises(PipelineError, match="there is no page"):
            web_ui.place(plan, plan.source, folder)
        web_ui.make(plan)
        web_ui.place(plan, plan.source, folder)
        placed = folder / "tools/ui/dist"
        assert texts(placed) == texts(plan.target)
        for path in web_ui.page_files(placed).values():
            os.utime(path, ns=(5, 5))
        (placed / "old.js").write_text("x")
        (placed / "sw.js").write_text("damaged")
        (placed / "build.json").unlink()
        web_ui.place(plan, plan.source, folder)
        assert texts(placed) == texts(plan.target)
        touched = {
            n for n, path in web_ui.page_files(placed).items() if path.stat().st_mtime_ns != 5
        }
        assert touched == {"sw.js", "build.json"}
        web_ui.place(None, plan.source, folder)
        assert not placed.exists()
        web_ui.place(None, plan.source, folder)

    def test_a_page_inside_the_source_is_refused(self, plan: Ui, folder: Path) -> None:
        own = plan.source.folder / "tools/ui/dist"
        own.mkdir()
        (own / "index.html").write_text("mine")
        for choice in (plan, None):
            with pytest.raises(PipelineError, match="would embed this page"):
                web_ui.place(choice, plan.source, folder)

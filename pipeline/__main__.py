"""doit under the name by which users start it: `./doitw`, or `doitw` on Windows.

doit itself falls over an empty word, which another program behind `--` may well want: it gets a
blank in its place, and the words for that program are read from `sys.argv` (tasks/doit.py).
"""

from __future__ import annotations

import gc
import signal
import sys

# What doit imports for `-n`, `--pdb`, doit.cfg, plugins, its own database and `info` alone: a sixth
# of the time that `list` takes.
UNUSED = (
    *("multiprocessing", "pdb", "configparser", "importlib.metadata", "pickle", "dbm", "pprint"),
    *("gettext", "queue", "textwrap"),
)


def main() -> None:
    """Run doit, and exit with its status."""
    gc.set_threshold(50_000)  # what is imported stays: to look for waste in it takes 5 % of a start
    from pipeline.core.lazy import imported_when_called, missing

    # msgspec needs the first for JSON Schemas, the second for versions of Python before 3.11.
    with imported_when_called("textwrap"), missing("typing_extensions"):
        import msgspec as msgspec

    from pipeline.core import log
    from pipeline.core.errors import UsageError

    from .tasks import completion
    from .tasks.command_line import PRINTING, understood, versions

    log.guard_streams()  # before doit is imported, which takes stdout as it is then
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        print(versions())
        return
    if words[:2] == ["completion", "words"] and words[2:]:
        print(*completion.candidates(words[2].removeprefix("="), words[3:]), sep="\n")
        return
    if words[:1] in (["-h"], ["--help"]):
        words = ["help"]
    try:
        words = understood(words)
    except UsageError as error:
        print(f"doitw: {error}", file=sys.stderr)
        sys.exit(3)
    if words[:1] and words[0] in PRINTING and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `list | head`: no word about it
    sys.argv = ["doitw", *words]  # what doit tells its user to type; read when it is imported
    with imported_when_called(*UNUSED):
        from doit.doit_cmd import DoitMain
        from doit.plugin import PluginDict

    # None of the other packages here brings plugins for doit: to look for them takes 20 ms.
    PluginDict._from_entry_points = lambda self, category: {}
    sys.exit(DoitMain().run([word or " " for word in words]))


if __name__ == "__main__":
    main()

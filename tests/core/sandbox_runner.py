"""Runs a program in the sandbox as another user or on a lesser system; a program of its own.

Gets JSON: `user` (a number, or null), `mechanism`, `sandbox`, `argv`. Prints JSON: the status and
what was printed. A kernel without Landlock, or a system without bubblewrap, is made by saying so.
"""

import json
import os
import resource  # noqa: F401 - another user may not read where it lies
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.core.process import outcome
from pipeline.core.sandbox import Sandbox, bubblewrap, landlock, seccomp, strength

WITHOUT = {
    "Landlock": (),
    "bubblewrap": (landlock,),
    "seccomp": (landlock, bubblewrap),
    "none": (landlock, bubblewrap, seccomp),
}


def main() -> None:
    request = json.loads(sys.argv[1])
    for module in WITHOUT[request["mechanism"]]:
        if module is landlock:
            landlock.abi = lambda: 0  # type: ignore[assignment]
        elif module is bubblewrap:
            bubblewrap.program = lambda: ""  # type: ignore[assignment]
        else:
            seccomp.is_here = lambda: False
    if request.get("abi"):
        landlock.abi = lambda: request["abi"]  # type: ignore[assignment]
    if request["user"] is not None:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    limits = strength()
    box = request["sandbox"]
    paths = {key: [Path(p) for p in box.pop(key, [])] for key in ("programs", "read", "write")}
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    status, out, err = outcome(
        request["argv"], timeout=120, env=env, sandbox=Sandbox(**paths, **box)
    )
    print(
        json.dumps(
            {
                "strength": limits.name,
                "lacks": limits.lacks,
                "status": status,
                "out": out,
                "err": err,
            }
        )
    )


if __name__ == "__main__":
    main()

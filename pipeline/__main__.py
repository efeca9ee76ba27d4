"""doit under the name by which users start it: `./doitw`, or `doitw` on Windows.

doit itself falls over an empty word, which another program behind `--` may well want: it gets a
blank in its place, and the words for that program are read from `sys.argv` (tasks/dashes.py).
"""

import sys


def main() -> int:
    """Run doit; its exit status."""
    sys.argv[0] = "doitw"  # what doit tells its user to type; read when it is imported
    from doit.doit_cmd import DoitMain

    return int(DoitMain().run([word or " " for word in sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())

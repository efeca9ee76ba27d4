"""doit under the name by which users start it: `./doitw`, or `doitw` on Windows.

doit itself falls over an empty word, which another program behind `--` may well want: it gets a
blank in its place, and the words for that program are read from `sys.argv` (tasks/dashes.py).
"""

import sys


def main() -> None:
    """Run doit, and exit with its status."""
    sys.argv[0] = "doitw"  # what doit tells its user to type; read when it is imported
    from doit.doit_cmd import DoitMain

    words = sys.argv[1:]
    if "" in words[: words.index("--") if "--" in words else None]:
        print("doitw: a word of the command line is empty: leave it out", file=sys.stderr)
        sys.exit(3)
    sys.exit(DoitMain().run([word or " " for word in words]))


if __name__ == "__main__":
    main()

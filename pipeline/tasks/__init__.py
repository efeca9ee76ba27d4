"""The table of steps, the words of a command line, and all that bends doit."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)

"""llama.cpp itself: its source, this host, the backends, and the build into `bins/`."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)

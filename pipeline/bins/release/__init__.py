"""The programs that llama.cpp's own project publishes."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)

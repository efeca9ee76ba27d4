"""A conversation with a model: the request, the terminal, and how answers look there."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)

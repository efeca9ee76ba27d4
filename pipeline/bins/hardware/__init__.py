"""What this machine has, and which backend it can run."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)

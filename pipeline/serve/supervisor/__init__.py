"""Many servers under one supervisor: one file holds the desired state, another the actual state."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)

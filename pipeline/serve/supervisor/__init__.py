"""Many servers under one supervisor: what is wanted is in one file, what is there in another."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)

"""What every step needs and no step owns. Nothing here knows what a model is."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)

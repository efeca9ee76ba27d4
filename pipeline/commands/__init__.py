"""What users type, one file each, and what these share. A command is imported when it is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.lazy import load_modules_when_used

if TYPE_CHECKING:
    from . import beside as beside
    from . import chat as chat
    from . import check as check
    from . import claude as claude
    from . import clean as clean
    from . import compare as compare
    from . import doctor as doctor
    from . import gateway as gateway
    from . import graph as graph
    from . import kubernetes as kubernetes
    from . import launch as launch
    from . import lock as lock
    from . import make as make
    from . import models as models
    from . import package as package
    from . import plan as plan
    from . import plan_servers as plan_servers
    from . import provenance as provenance
    from . import prune as prune
    from . import ps as ps
    from . import quality as quality
    from . import ray as ray
    from . import remove as remove
    from . import resolve as resolve
    from . import serve as serve
    from . import test as test
    from . import tune as tune
    from . import up as up
    from . import upgrade as upgrade
    from . import verify as verify

load_modules_when_used(__name__)

"""The variables of `ray`, beside those that it shares with `kubernetes`."""

from __future__ import annotations

from pipeline.core.variables import Group, text, variable


class RayVariables(Group):
    """Which cluster."""

    address: str = variable(
        text,
        "the dashboard of a running Ray cluster, such as `http://head:8265`",
        shown="`RAY_ADDRESS`; without it, a Ray on this machine",
    )
    node: str = variable(
        text,
        "run this machine as a node of a Ray cluster, in the foreground: `head`, or the address "
        "of its head, such as `10.0.0.1:6379`",
    )

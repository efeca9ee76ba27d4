"""The servers of a file on a cluster, by Ray Serve.

`config` makes Serve's configuration and `rayservice` KubeRay's resource, both without effects;
`cluster` talks to a cluster's dashboard, `nodes` holds what servers need against what nodes have,
`local` runs a Ray on this machine. What runs inside Ray is loaded there alone: nothing else here
imports it.
"""

"""Deployment: containers, clusters, and clients.

`__main__` has the image's commands. `boot` reads the variables, `container` acts on them, `package`
installs llama.cpp's programs, `health` is the health check. `kubernetes/` writes manifests,
`ray/` runs servers on a cluster, `claude` configures Claude Code.
"""

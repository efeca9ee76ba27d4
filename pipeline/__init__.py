"""Any model reference to a running llama.cpp server, doing only the work that is missing.

A map, in reading order (each folder imports only those above it):

    core/     knows nothing of models: errors, folders, variables, receipts, locks, processes,
              downloads
    bins/     llama.cpp itself: pinned source, the host, backends, the build
    models/   references, the hub and what is chosen from it, headers, conversion, quantization,
              memory, pipeline.lock
    serve/    flags, the launch, the foreground server; many servers: config/ reads the files that
              ask for them, fleet/ keeps them, gateway/ is one address for all
    deploy/   containers, manifests for Kubernetes, Claude Code
    tasks/    glue: turns the above into doit tasks; `dodo.py` is their table of contents

`pins.toml` beside this file holds every pinned commit, tree and archive.
"""

"""Any model reference to a running llama.cpp server, doing only the work that is missing.

A map, in reading order (each folder imports only those above it):

    core/     knows nothing of models: errors, folders, variables, receipts, locks, processes,
              downloads
    bins/     llama.cpp itself: pinned source, the host, backends, the build
    models/   references, the hub and what is chosen from it, headers, conversion, quantization,
              memory, pipeline.lock
    serve/    flags, the launch, the foreground server; many servers: config/ reads their files,
              supervisor/ keeps them running, gateway/ is one address for all
    chat/     a conversation in the terminal
    report/   what is measured of a model, the search for its fastest settings, and pictures
    deploy/   containers, manifests for Kubernetes, Claude Code
    commands/ what users type, and what the commands share: the request, programs, models, servers
    tasks/    turns the commands into doit tasks; `dodo.py` is their table of contents

`pins.toml` beside this file holds every pinned commit, tree and archive.
"""

#!/bin/sh
# The container's program: docker/entrypoint as dev, below an init that forwards signals and reaps.
set -eu
cd /soft/workspace 2>/dev/null || cd /home/dev
# PeiDocker's command: without a terminal's user it would do nothing, and overlook SIGTERM.
[ "$*" != /bin/bash ] || set -- sleep infinity
export INFER_DEV_NOTICE=/run/infer-dev/notice # what fails does not end the container
export HOME=/home/dev LOGNAME=dev SHELL=/bin/bash USER=dev
exec tini -s -- setpriv --reuid=dev --regid=dev --init-groups \
    /opt/llama-pipeline/docker/entrypoint "$@"

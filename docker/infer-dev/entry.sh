#!/bin/sh
# The entry point of the image that docker/Dockerfile makes. PeiDocker has one of its own, which
# calls prepare.sh, starts sshd and ends in start.sh as well.
set -eu
here=$(dirname "$(readlink -f "$0")")
"$here/prepare.sh"
/usr/sbin/sshd
exec "$here/start.sh" "$@"

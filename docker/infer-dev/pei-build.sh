#!/bin/sh
# PeiDocker's stage 2: one script, since of several only the last one's failure would be noticed.
# pei-build.sh [UID]: see install-project.sh.
set -eu
here=$(dirname "$(readlink -f "$0")")
sh "$here/install-project.sh" "${1:-1000}"

# At each start PeiDocker would make every file of a mounted folder writable and executable for
# all, those of the workspace on the host too; prepare.sh gives people what they need.
sed -i -e 's/echo "Changing permission.*/:/' -e '/chmod 777 -R/d' \
    "$PEI_STAGE_DIR_2/internals/create-links.sh"

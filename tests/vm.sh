#!/bin/bash
# `make test-vm`: the watchdog under a real systemd, with the units as they are shipped, on Debian's
# own kernel. Builds the image with hostler itself, or takes one that was built before.
#
#   vm.sh PROGRAMS [IMAGE.qcow2]
set -euo pipefail

programs=$(realpath "${1:?the folder with hostler and hostlerd}")
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d /var/tmp/hostler-vm.XXXXXX)
machine=
# shellcheck disable=SC2317  # called by the trap
clean_up() {
    status=$?
    [ -z "$machine" ] || kill -KILL "$machine" 2>/dev/null || true
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

image=${2:-}
if [ -z "$image" ]; then
    "$programs/hostler" build "$here/../runner/examples/debian-12.toml" --output "$work/out"
    image=$work/out/debian-12.qcow2
fi
qemu-img convert -O raw "$image" "$work/disk"

# Files go into the file system of the image's only partition, which begins at 1 MiB.
nonce=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
sed "s/@NONCE@/$nonce/" "$here/vm/inside.sh" >"$work/inside.sh"
cat >"$work/vm-test.service" <<'END'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/bin/vm-test
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS1
END
commands=$work/commands
put() { # put FILE PLACE MODE
    printf 'write %s %s\nsif %s mode %s\nsif %s uid 0\nsif %s gid 0\n' "$1" "$2" "$2" "$3" "$2" "$2" >>"$commands"
}
units=$here/../systemd
printf 'mkdir /etc/hostler\n' >"$commands"
put "$programs/hostlerd" /usr/bin/hostlerd 0100755
put "$programs/hostler" /usr/bin/hostler 0100755
put "$work/inside.sh" /usr/bin/vm-test 0100755
put "$work/vm-test.service" /usr/lib/systemd/system/vm-test.service 0100644
put "$units/hostlerd.service" /usr/lib/systemd/system/hostlerd.service 0100644
put "$units/hostlerd.socket" /usr/lib/systemd/system/hostlerd.socket 0100644
put "$units/hostler.sysusers" /usr/lib/sysusers.d/hostler.conf 0100644
put "$units/hostler.tmpfiles" /usr/lib/tmpfiles.d/hostler.conf 0100644
put "$units/hostlerd.toml" /etc/hostler/hostlerd.toml 0100644
echo 'symlink /etc/systemd/system/multi-user.target.wants/vm-test.service /usr/lib/systemd/system/vm-test.service' >>"$commands"
said=$(debugfs -w -f "$commands" "$work/disk?offset=1048576" 2>&1 >/dev/null | grep -v '^debugfs ' || true)
[ -z "$said" ] || { echo "$said" >&2; exit 1; }

qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -machine q35 -smp 2 -m 1G \
    -accel tcg,thread=multi -nic none -serial "file:$work/console" -serial "file:$work/results" \
    -drive "if=virtio,format=raw,cache=unsafe,file=$work/disk" \
    -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny &
machine=$!
# Under emulation: half a minute to boot, a minute or two for the test.
for _ in $(seq 600); do
    kill -0 "$machine" 2>/dev/null || break
    sleep 1
done
kill -KILL "$machine" 2>/dev/null || true
wait "$machine" 2>/dev/null || true
machine=

# The first serial line has a login prompt on it; the second is the test's alone.
tr -d '\r' <"$work/results" | tr -cd '\11\12\40-\176' || true
if tr -d '\r' <"$work/results" | grep -aq "vm-test: all passed $nonce"; then
    exit 0
fi
echo "the end of the guest's console:" >&2
tail -c 6000 "$work/console" | tr -d '\r' | tr -cd '\11\12\40-\176' >&2
exit 1

#!/bin/bash
# Runs as root in the guest of `make test-vm`: the watchdog under systemd, with the units as they are
# shipped. Each check prints one line; exit status 0 only if all hold.
set -u

failed=0
check() { # check WHAT COMMAND…: the command must succeed
    local what=$1
    shift
    if "$@" >/tmp/said 2>&1; then
        echo "units: ok: $what"
    else
        echo "units: WRONG: $what: $(tr '\n' '|' </tmp/said | cut -c1-600)"
        failed=1
    fi
}
fails() { ! "$@"; }
eventually() { # eventually COMMAND…: within 20 s, or as many times longer as this machine is slower
    for _ in $(seq $((100 * ${HOSTLER_TESTS_PATIENCE:-1}))); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.2
    done
    "$@"
}

echo "units: kernel $(uname -r), $(systemctl --version | head -n 1)"
install -m 0755 /mnt/hostlerd /mnt/hostler /usr/bin
install -m 0644 /mnt/systemd/hostlerd.service /mnt/systemd/hostlerd.socket /usr/lib/systemd/system
install -m 0644 /mnt/systemd/hostler.sysusers /usr/lib/sysusers.d/hostler.conf
install -m 0644 /mnt/systemd/hostler.tmpfiles /usr/lib/tmpfiles.d/hostler.conf
install -D -m 0644 /mnt/systemd/hostlerd.toml /etc/hostler/hostlerd.toml
systemd-sysusers
systemd-tmpfiles --create 2>/dev/null
modprobe loop
systemctl daemon-reload
check "the socket unit starts" systemctl start hostlerd.socket
check "the first client starts the daemon" hostler status
check "the daemon tells systemd that it is ready" systemctl is-active hostlerd.service
check "it runs in the host's mount namespace" \
    test "$(readlink "/proc/$(systemctl show -P MainPID hostlerd)/ns/mnt")" = "$(readlink /proc/1/ns/mnt)"
check "members of the group may ask" setpriv --reuid 4001 --regid 4001 --groups hostler hostler status
check "others may not" fails setpriv --reuid 4002 --regid 4002 --clear-groups hostler status

mkdir -p /var/tmp/bystander /var/tmp/work
truncate -s 8M /var/tmp/bystander.image && mke2fs -q -t ext4 /var/tmp/bystander.image
mount -o loop /var/tmp/bystander.image /var/tmp/bystander
bystander=$(findmnt -n -o SOURCE /var/tmp/bystander)

leaks() {
    losetup -n -O NAME -l | grep -v "$bystander"
    findmnt -rn -o TARGET | grep /var/tmp/work
    grep -lzx 3600 /proc/[0-9]*/cmdline 2>/dev/null
    dmsetup ls 2>/dev/null | grep hostler-units
    swapon --noheadings --show=NAME
}
# Of everything else that has a device: a partition, a map on another, swap on a third.
cat >/tmp/devices.sh <<'end'
set -e
cd "$1"
for name in disk lower swap; do truncate -s 32M $name; done
printf '2048,,83\n' | sfdisk --quiet disk
disk=$(losetup --find --show --partscan disk)
udevadm settle
mke2fs -q -t ext4 "${disk}p1"
mkdir mnt
mount "${disk}p1" mnt
dmsetup create hostler-units --table "0 32768 linear $(losetup --find --show lower) 0"
area=$(losetup --find --show swap)
mkswap -q "$area"
swapon "$area"
touch ready
sleep 3600
end
nothing_left() { [ -z "$(leaks)" ]; }
leak() { # leak [SCRIPT]: starts a builder under a lease, and waits until it has something to leak
    rm -rf /var/tmp/work
    mkdir /var/tmp/work
    hostler run --claim /var/tmp/work -- sh "${1:-./chroot-builder.sh}" /var/tmp/work &
    runner=$!
    eventually test -e /var/tmp/work/ready
    sleep 1
}

leak
check "the builder has something to leak" fails nothing_left
check "why names the lease" sh -c 'hostler why /var/tmp/work/root | grep -q "\[lease "'
kill -KILL "$runner"
check "all of it is taken back" eventually nothing_left
[ -z "$(leaks)" ] || { hostler status; hostler why /dev/loop1; journalctl -u hostlerd.service --no-pager -o cat | tail -n 25; }
check "the host's own mounts are still there" findmnt /dev/pts
check "the bystander's too" findmnt /var/tmp/bystander

leak /tmp/devices.sh
check "another has a partition, a map and swap to leak" sh -c 'dmsetup ls | grep -q hostler-units && swapon --show | grep -q loop && findmnt /var/tmp/work/mnt'
kill -KILL "$runner"
check "the unit lets these be taken back too" eventually nothing_left
[ -z "$(leaks)" ] || { leaks; hostler status; journalctl -u hostlerd.service --no-pager -o cat | tail -n 25; }

leak
systemctl kill --signal=KILL hostlerd.service
kill -KILL "$runner"
check "killed and started again by systemd, it finishes" eventually nothing_left
check "it is running again" eventually systemctl is-active hostlerd.service
check "the metrics tell of it" bash -c 'exec 3<>/dev/tcp/127.0.0.1/9821; printf "GET /metrics HTTP/1.0\r\n\r\n" >&3; grep -q "^hostler_reclaims_total{kind=\"loop\",outcome=\"reclaimed\"} [1-9]" <&3'
check "a reload is taken" systemctl reload hostlerd.service
check "it stops within its time" timeout 15 systemctl stop hostlerd.service hostlerd.socket
check "and leaves no socket" fails test -e /run/hostler/hostler.sock
check "it was not refused anything" fails sh -c 'journalctl -u hostlerd.service -p warning --no-pager -q -o cat | grep -iE "denied|not permitted"'

if [ "$failed" != 0 ]; then
    journalctl -u hostlerd.service --no-pager -o cat | tail -n 60
fi
# Nothing of it is in the way of what comes after.
umount /var/tmp/bystander
rm -rf /var/tmp/bystander /var/tmp/bystander.image /var/tmp/work
exit "$failed"

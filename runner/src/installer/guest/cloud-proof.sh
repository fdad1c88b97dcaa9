#!/bin/sh
# After cloud-init's last stage: were all its modules well? Then the proof, from an image as fresh as
# before: nothing of this build's instance is left in it.

@FIND_PORT@
[ -c "$port" ] || exit 1
exec 3>"$port"
if ! grep -q '"errors": \[\]' /run/cloud-init/result.json; then
    cat /run/cloud-init/result.json >/dev/console
    echo "fail cloud-init 1" >&3
    sleep 3600
fi
cloud-init clean --logs
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id
sync
fstrim / 2>/dev/null
# Read-only, so that what is on the disk is whole when the machine goes.
mount -o remount,ro / 2>/dev/null || systemctl --no-block poweroff
sync
echo "done @NONCE@" >&3
sleep 3600

#!/bin/bash
# What the machine runs of its second disk: as root, in a service of systemd's, with the serial line as
# its output. Runs the command, and tells hostler-vm over the virtio port how it ended:
# `fail command STATUS`, or `done NONCE`, which only this machine's firmware knows.
port=/dev/virtio-ports/org.hostler.control
# udev makes it, and systemd does not wait for that.
for _ in $(seq 300); do
    [ -e "$port" ] && break
    sleep 0.1
done
if ! exec 3>"$port"; then
    echo "hostler-tests: there is no $port; did the module virtio_console load?"
    systemctl poweroff --force --force
fi
echo "hostler-tests: begin"
echo "stage command" >&3
# The port is closed for the command, so that nothing of it can say it was done.
bash /mnt/command </dev/null 3>&-
status=$?
echo "hostler-tests: end"
# All of it must have been sent before the end is told; stty waits for that.
stty -F /dev/ttyS0 sane
if [ "$status" = 0 ]; then
    echo "done $(cat /sys/class/dmi/id/product_serial)" >&3
else
    echo "fail command $status" >&3
fi
# The machine is thrown away: nothing is worth being stopped in order or written to its disk. The
# descriptor stays open, since closing it could drop what was not read yet.
systemctl poweroff --force --force
sleep 60

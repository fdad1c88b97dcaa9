#!/bin/sh
# What image builders do, and leave behind when they die: an image on a loop device, mounted, with mounts in
# it, and a process that left the session. Usage: chroot-builder.sh DIR. It stays until it is killed; DIR/ready
# tells that all is there, and DIR/pids whose processes those are.
set -e
cd "$1"
truncate -s 64M image
mke2fs -q -t ext4 image
mkdir root
mount -o loop image root
mkdir root/dev root/proc root/sys
mount --bind /dev root/dev
mount --bind /proc root/proc
mount --bind /sys root/sys
(cd root && exec setsid sleep 3600) &
inside=$!
sleep 3600 &
for pid in $inside $! $$; do echo "$pid $(ps -o lstart= -p "$pid")"; done >pids
touch ready
wait

#!/bin/bash
# What a careful administrator writes against leaks: janitor.sh DIRECTORY..., where each has an `image`
# behind a loop device that is mounted on `mnt` with more mounted inside, and the number of a process that
# was left in it in `pid`. Says what it could not do. All processes are ended first and waited for
# together, since waiting for one after the other costs most.
set -u
failures=0
complain() {
    echo "janitor: $*" >&2
    failures=$((failures + 1))
}

running=()
for directory in "$@"; do
    pid=$(<"$directory/pid")
    # The number may be another's by now: the one that was left stands in the mount.
    if [[ $(readlink "/proc/$pid/cwd") == "$directory"/mnt* ]]; then
        kill -KILL "$pid" && running+=("$pid")
    fi
done
for ((try = 0; try < 1000 && ${#running[@]} > 0; try++)); do
    left=()
    for pid in "${running[@]}"; do
        kill -0 "$pid" 2>/dev/null && left+=("$pid")
    done
    running=("${left[@]}")
    [ ${#running[@]} -gt 0 ] && sleep 0.005
done
[ ${#running[@]} -gt 0 ] && complain "these do not end: ${running[*]}"

for directory in "$@"; do
    # The deepest first.
    umount --recursive "$directory/mnt" || complain "$directory/mnt stays mounted"
    for device in $(losetup --noheadings --output NAME --associated "$directory/image"); do
        losetup --detach "$device" || complain "$device stays attached"
    done
    # That detaching succeeded does not say that it is detached.
    [ -z "$(losetup --noheadings --output NAME --associated "$directory/image")" ] ||
        complain "the loop device of $directory is still there"
    mountpoint --quiet "$directory/mnt" && complain "$directory/mnt is still mounted"
done
exit $((failures > 0))

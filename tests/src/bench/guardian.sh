#!/bin/bash
# Clears a bench's place when the bench is gone without having done it: guardian.sh DIRECTORY GROUP...
# Only what is below that directory or in those control groups is touched. Standard input ends with the
# bench, however that ends; the word "done" means that nothing is to be done.
directory=$1
shift
if read -r word && [ "$word" = "done" ]; then
    exit 0
fi

processes() { find "$@" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u; }
for ((try = 0; try < 250; try++)); do
    mapfile -t pids < <(processes "$@")
    [ ${#pids[@]} = 0 ] && break
    kill -KILL "${pids[@]}" 2>/dev/null
    sleep 0.02
done

# The first is the outermost one, and a lazy unmount takes all that is on it along. Paths in a place
# have no characters that are escaped here.
outermost() { awk -v below="$directory/" 'index($5, below) == 1 { print $5; exit }' /proc/self/mountinfo; }
for ((try = 0; try < 20000; try++)); do
    point=$(outermost)
    [ -z "$point" ] && break
    umount --lazy --no-canonicalize "$point" || break
done

for file in /sys/block/loop*/loop/backing_file; do
    if read -r backing 2>/dev/null <"$file" && [[ $backing == "$directory"/* ]]; then
        device=${file#/sys/block/}
        losetup --detach "/dev/${device%%/*}"
    fi
done
find "$@" -depth -type d -exec rmdir {} + 2>/dev/null
rm -rf --one-file-system "$directory"

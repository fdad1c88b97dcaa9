#!/bin/bash
# A mount namespace of a bench's host, with processes: namespace.sh READY COUNT [NODE POINT]...
set -eu
ready=$1 count=$2
shift 2
while [ $# -gt 0 ]; do
    mount -t ext4 "$1" "$2"
    shift 2
done
for ((index = 1; index < count; index++)); do
    sleep 3600 &
done
echo >"$ready"
wait

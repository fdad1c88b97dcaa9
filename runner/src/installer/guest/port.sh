#!/bin/sh
# Runs in debian-installer from its start: opens the build's port, and passes on what is written to
# /run/hostler-port. The port can be opened once at a time, so everything goes through here. What the
# installer does is told by its own log.

mkdir -p /run
mknod /run/hostler-port p
(
    tries=0
    port=
    while [ -z "$port" ] && [ "$tries" -lt 600 ]; do
        modprobe virtio_console 2>/dev/null
        @FIND_PORT@
        [ -c "$port" ] || port=
        [ -n "$port" ] || sleep 1
        tries=$((tries + 1))
    done
    [ -n "$port" ] || exit 1
    exec 3>"$port"
    # Open for writing as well, so that it never ends.
    exec 4<>/run/hostler-port
    while read -r line; do
        echo "$line" >&3
    done <&4
) </dev/null >/dev/null 2>&1 &
(
    while [ ! -e /var/log/syslog ]; do
        sleep 1
    done
    tail -f /var/log/syslog | while read -r line; do
        case $line in
        *"main-menu["*"Menu item '"*"' selected"*)
            item=${line#*Menu item \'}
            echo "stage ${item%%\'*}" >/run/hostler-port
            ;;
        *) ;;
        esac
    done
) </dev/null >/dev/null 2>&1 &
exit 0

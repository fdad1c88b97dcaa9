#!/bin/bash
# `make demo`: everything that Hostler is for, with real parts, in one go.
#
# Builds a Debian image as an ordinary user, boots it, builds it again from the cache, kills a third
# build and a chroot builder with SIGKILL, and shows that nothing of either is left while a
# bystander's loop mount is untouched. Exit status 0 only if all of that is true. Touches nothing
# but a directory of its own, and cleans up whatever happens.
set -euo pipefail

programs=$(realpath "${1:?the folder with hostler and hostlerd}")
here=$(dirname "$(realpath "$0")")
recipe=$here/../runner/examples/debian-12.toml

if [ "$(id -u)" != 0 ]; then
    echo "demo: the watchdog needs root; asking sudo"
    exec sudo -- "$(realpath "$0")" "$programs"
fi

# The build's user: whoever called sudo, else a number that nobody on this host has. It needs no
# account, no group and no device.
if [ -n "${SUDO_UID:-}" ] && [ "$SUDO_UID" != 0 ]; then
    user=$SUDO_UID
    group=${SUDO_GID:-$SUDO_UID}
else
    user=64321
    while getent passwd "$user" >/dev/null; do user=$((user + 1)); done
    group=$user
fi

work=$(mktemp -d /var/tmp/hostler-demo.XXXXXX)
socket=$work/hostler.sock
# The build's user may not be able to reach them where they are, below /root for one.
mkdir "$work/bin"
cp "$programs/hostler" "$programs/hostlerd" "$work/bin"
programs=$work/bin
daemon=
bystander_loop=
failed=0

say() { printf '\n== %s\n' "$*"; }
ok() { printf '   ok: %s\n' "$*"; }
wrong() {
    printf '   WRONG: %s\n' "$*" >&2
    failed=1
}

# shellcheck disable=SC2317  # called by the trap
clean_up() {
    status=$?
    trap - EXIT INT TERM HUP
    set +e
    # The daemon first takes back what is still leased: its clients below are killed.
    for pid in ${clients[@]+"${clients[@]}"}; do
        kill -KILL "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
    done
    if [ -n "$daemon" ]; then
        for _ in $(seq 100); do
            "$programs/hostler" --socket "$socket" lease list 2>/dev/null | grep -Eq ' (open|closing|reclaiming|PINNED) ' || break
            sleep 0.1
        done
        kill -TERM "$daemon" 2>/dev/null
        wait "$daemon" 2>/dev/null
    fi
    if [ -n "$bystander_loop" ]; then
        mountpoint -q "$work/bystander/mounted" && umount "$work/bystander/mounted"
        losetup -d "$bystander_loop"
    fi
    if findmnt -rn -o TARGET | grep -qF "$work"; then
        echo "demo: something is still mounted below $work; it is kept, and nothing below it was deleted" >&2
        status=1
    else
        rm -rf --one-file-system "$work"
    fi
    exit "$status"
}
clients=()
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Before a command: run it as the build's user, with nothing of root's environment. Not a function:
# one in the background would be a shell of its own, and killing that kills nothing else.
as_user=(setpriv --reuid "$user" --regid "$group" --clear-groups --no-new-privs
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME="$work/home" LANG=C.UTF-8)

now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }
# field NAME FILE: a number or text of a one-line JSON document.
field() { sed -n "s/.*\"$1\": *\"\\{0,1\\}\\([^,\"}]*\\).*/\\1/p" "$2" | head -n 1; }

# What there is of the demo's on this host, but for what it needs itself.
leftovers() {
    {
        losetup -l -n -O NAME,BACK-FILE | grep -F "$work" | grep -vF "$work/bystander/"
        findmnt -rn -o TARGET,SOURCE | grep -F "$work" | grep -vF "$work/bystander/"
        ps -eo pid,user,args | grep -F "$work" | grep -vE "grep|hostlerd|demo.sh"
        # The builder's own processes say nothing of where they work: by number and start.
        while read -r pid start; do
            [ "$(ps -o lstart= -p "$pid")" = "$start" ] && ps -o pid,user,args --no-headers -p "$pid"
        done < <(cat "$work/chroot/pids" 2>/dev/null)
        find "$work/out" -maxdepth 2 -name '.hostler*' 2>/dev/null
        # The control groups of this daemon's leases, by its journal.
        grep -o '/sys/fs/cgroup[^"]*/hostler-lease-[0-9a-f-]*' "$work/state/journal" | sort -u | xargs -r ls -d 2>/dev/null
    } | sort -u || true
}

install -d -o "$user" -g "$group" -m 0700 "$work/home" "$work/out" "$work/cache" "$work/chroot"
chmod 0755 "$work"
start=$(now)

say "a bystander: a loop mount that was here all along"
mkdir -p "$work/bystander/mounted"
truncate -s 16M "$work/bystander/image"
mke2fs -q -t ext4 "$work/bystander/image"
bystander_loop=$(losetup --find --show "$work/bystander/image")
mount -t ext4 "$bystander_loop" "$work/bystander/mounted"
echo "do not touch" >"$work/bystander/mounted/note"
sequence_before=$(cat "/sys/block/${bystander_loop#/dev/}/diskseq")
mount_before=$(findmnt -rn -o ID,TARGET "$work/bystander/mounted")
losetup -l -O NAME,BACK-FILE "$bystander_loop"

say "the watchdog, on a socket of its own"
cat >"$work/hostlerd.toml" <<END
[api]
socket = "$socket"
[state]
directory = "$work/state"
END
"$programs/hostlerd" --config "$work/hostlerd.toml" 2>"$work/hostlerd.log" &
daemon=$!
for _ in $(seq 100); do
    [ -S "$socket" ] && break
    sleep 0.1
done
"$programs/hostler" --socket "$socket" status

build() { # build NAME: builds as the user; the JSON document goes to NAME.json
    "${as_user[@]}" "$programs/hostler" --socket "$socket" --json build "$work/recipe.toml" \
        --output "$work/out/$1" --cache "$work/cache" >"$work/$1.json"
}
cp "$recipe" "$work/recipe.toml"
chmod 0644 "$work/recipe.toml"

say "first build, as user $user: no root, no loop device, no libvirt"
began=$(now)
build first
first=$(since "$began")
ok "built, and the image has booted and proven it, in $first s"

say "second build, from the cache"
began=$(now)
build second
second=$(since "$began")
upstream=$(field upstream_bytes "$work/second.json")
if [ "$upstream" = 0 ]; then ok "no package byte came from upstream"; else wrong "$upstream bytes of packages came from upstream"; fi

say "third build, killed with SIGKILL while its virtual machine works"
"${as_user[@]}" "$programs/hostler" --socket "$socket" build "$work/recipe.toml" \
    --output "$work/out/third" --cache "$work/cache" >"$work/third.log" 2>&1 &
third=$!
clients+=("$third")
machine=
for _ in $(seq 1200); do
    # The machine that does the work, not the short ones that find out what can run: only it has
    # a disk.
    machine=$(pgrep -U "$user" -f "qemu-system.*$work.*disk0" | head -n 1) && [ -n "$machine" ] && break
    kill -0 "$third" 2>/dev/null || break
    sleep 0.1
done
if [ -z "$machine" ]; then
    cat "$work/third.log"
    wrong "the third build never started its machine"
else
    sleep 5
    ps -o pid,user,etime,comm -p "$machine,$third" || true
    # setpriv and env have become it: this is hostler itself.
    kill -KILL "$third"
    wait "$third" 2>/dev/null || true
    clients=()
    began=$(now)
    for _ in $(seq 300); do
        [ -z "$(leftovers)" ] && break
        sleep 0.1
    done
    third_gone=$(since "$began")
    if [ -z "$(leftovers)" ]; then ok "nothing of it was left after $third_gone s"; else wrong "still there: $(leftovers)"; fi
fi

say "a chroot builder under 'hostler run', killed with SIGKILL in the middle"
chown 0:0 "$work/chroot"
"$programs/hostler" --socket "$socket" run --name chroot-builder --claim "$work/chroot" -- \
    "$here/chroot-builder.sh" "$work/chroot" &
runner=$!
clients+=("$runner")
for _ in $(seq 200); do
    [ -e "$work/chroot/ready" ] && break
    sleep 0.1
done
sleep 0.3
losetup -l -O NAME,BACK-FILE
findmnt -rn -o TARGET,SOURCE | grep -F "$work/chroot" || wrong "the builder mounted nothing"
"$programs/hostler" --socket "$socket" why "$work/chroot/root"
began=$(now)
kill -KILL "$runner"
wait "$runner" 2>/dev/null || true
clients=()
for _ in $(seq 300); do
    [ -z "$(leftovers)" ] && break
    sleep 0.02
done
run_gone=$(since "$began")
if [ -z "$(leftovers)" ]; then ok "nothing of it was left after $run_gone s"; else wrong "still there: $(leftovers)"; fi

say "what is there now, by losetup, findmnt and ps"
echo "losetup:" && losetup -l -n -O NAME,BACK-FILE | grep -F "$work" || true
echo "findmnt:" && findmnt -rn -o TARGET,SOURCE | grep -F "$work" || true
echo "ps:" && { ps -eo pid,user,args | grep -E "qemu-system|$work" | grep -vE 'grep|hostlerd|demo.sh' || echo "  (no process)"; }
sequence_after=$(cat "/sys/block/${bystander_loop#/dev/}/diskseq")
mount_after=$(findmnt -rn -o ID,TARGET "$work/bystander/mounted")
if [ "$sequence_before" = "$sequence_after" ] && [ "$mount_before" = "$mount_after" ] &&
    [ "$(cat "$work/bystander/mounted/note")" = "do not touch" ]; then
    ok "the bystander's loop mount is the same as before"
else
    wrong "the bystander's loop mount was touched"
fi
"$programs/hostler" --socket "$socket" status

say "times and counts"
bytes() { numfmt --to=iec-i --suffix=B "${1:-0}"; }
printf '%-44s %10s\n' \
    "first build, with its boot" "$first s" \
    "  packages" "$(field packages "$work/first.json")" \
    "  downloaded" "$(bytes "$(field upstream_bytes "$work/first.json")")" \
    "  image" "$(bytes "$(field bytes "$work/first.json")")" \
    "  accelerator" "$(field accelerator "$work/first.json")" \
    "second build, with its boot" "$second s" \
    "  package bytes from upstream" "$upstream" \
    "killed build: until nothing was left" "${third_gone:-?} s" \
    "killed chroot builder: until nothing was left" "$run_gone s" \
    "steps of the watchdog that were done" "$(grep -c ': done$' "$work/hostlerd.log" || true) steps" \
    "all of it" "$(since "$start") s"

if [ "$failed" = 0 ]; then
    say "everything was as it should be"
else
    say "something was WRONG, see above; the watchdog's log:"
    tail -n 40 "$work/hostlerd.log"
fi
exit "$failed"

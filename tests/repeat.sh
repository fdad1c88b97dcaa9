#!/bin/bash
# `make test-repeat`: what is built once can be built again from the cache, and without any network.
#
#   repeat.sh PROGRAMS [RECIPE…]
#
# Builds each recipe (unless named, the examples that need nothing but an archive) three times, as an ordinary user, with one cache. The
# second build must take no byte from upstream. The third runs with --offline in a network namespace that
# has no interface but a loopback that is down. All three must have the same packages, by the dpkg databases
# in their results, which are read without Hostler. Exit status 0 only if all of that is true.
# CACHE=DIR keeps the cache there, so that the first build downloads less the next time.
set -euo pipefail

programs=$(realpath "${1:?the folder with hostler}")
shift
here=$(dirname "$(realpath "$0")")
if [ $# = 0 ]; then
    for name in debian-12 debootstrap vmdb2 debian-installer; do
        set -- "$@" "$here/../runner/examples/$name.toml"
    done
fi

# Root builds as a user that nobody on this host is.
user=$(id -u)
as_user=()
if [ "$user" = 0 ]; then
    user=64321
    while getent passwd "$user" >/dev/null; do user=$((user + 1)); done
    as_user=(setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs)
fi
work=$(mktemp -d /var/tmp/hostler-repeat.XXXXXX)
build=
# shellcheck disable=SC2317  # called by the trap
clean_up() {
    status=$?
    trap - EXIT INT TERM HUP
    if [ -n "$build" ]; then
        kill -TERM "$build" 2>/dev/null || true
        wait "$build" 2>/dev/null || true
    fi
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
chmod 0755 "$work"
cp "$programs/hostler" "$work"
cache=${CACHE:-$work/cache}
for folder in "$work/home" "$work/out" "$cache"; do
    mkdir -p "$folder"
    [ "$(id -u)" != 0 ] || chown "$user:$user" "$folder"
done
as_user+=(env -i "PATH=/usr/sbin:/usr/bin:/sbin:/bin" "HOME=$work/home" LANG=C.UTF-8)
for name in http_proxy https_proxy no_proxy SSL_CERT_FILE HOSTLER_MIRROR; do
    [ -z "${!name:-}" ] || as_user+=("$name=${!name}")
done
failed=0
ok() { printf '   ok: %s\n' "$*"; }
wrong() {
    printf '   WRONG: %s\n' "$*" >&2
    failed=1
}
field() { sed -n "s/.*\"$1\": *\"\\{0,1\\}\\([^,\"}]*\\).*/\\1/p" "$2" | head -n 1; }

# run NAME WORD…: builds into out/NAME, by way of the words before; the JSON document goes to NAME.json.
run() {
    local name=$1
    shift
    "${as_user[@]}" "${wrap[@]}" "$work/hostler" --socket /nonexistent --json build "$recipe" --cache "$cache" \
        --output "$work/out/$name" --lock "$work/out/$name.lock" "$@" >"$work/$name.json" 2>"$work/$name.log" &
    build=$!
    local status=0
    wait "$build" || status=$?
    build=
    if [ "$status" != 0 ]; then
        wrong "the build ended with status $status; it said:"
        tail -n 25 "$work/$name.log" "$work/$name.json" >&2
        return 1
    fi
}

# The packages of what a build made, with their versions: of a disk's largest partition, or of an archive.
packages() {
    local status=$work/status made start
    : >"$status"
    for made in "$1"/*.qcow2 "$1"/*/*.tar; do
        case $made in
        *'*'*) ;;
        *.qcow2)
            qemu-img convert -O raw "$made" "$work/raw"
            start=$(sfdisk --json "$work/raw" | tr -d ' ",' | awk -F: '/^start:/ {s = $2} /^size:/ && $2 > best {best = $2; at = s} END {print at}')
            debugfs -R 'cat /var/lib/dpkg/status' "$work/raw?offset=$((start * 512))" 2>/dev/null >>"$status"
            rm "$work/raw"
            ;;
        *.tar) tar --extract --to-stdout --file "$made" ./var/lib/dpkg/status >>"$status" ;;
        esac
    done
    awk '/^Package: / {p = $2} /^Version: / {v = $2} /^Status: / {s = $4} /^$/ {print p, v, s}' "$status" | sort
}

for recipe; do
    name=$(basename "$recipe" .toml)
    printf '== %s\n' "$name"
    # A recipe may have files beside it.
    mkdir "$work/recipes"
    cp "$recipe" "$work/recipes"
    [ ! -d "${recipe%.toml}" ] || cp -r "${recipe%.toml}" "$work/recipes"
    recipe=$work/recipes/$name.toml
    # How long it takes on this host is not what is asked here.
    sed -i 's/^total = .*/total = "6h"/' "$recipe"
    chmod -R a+rX "$work/recipes"
    for turn in first second third; do
        wrap=()
        began=$SECONDS
        if [ "$turn" = third ]; then
            wrap=(unshare --user --map-current-user --net)
            run "$turn" --offline || break
        else
            run "$turn" || break
        fi
        packages "$work/out/$turn" >"$work/$turn.packages"
        printf '   %s build: %s packages in it, %s B of packages and %s B of release files from upstream, %s s\n' "$turn" \
            "$(wc -l <"$work/$turn.packages")" "$(field upstream_bytes "$work/$turn.json")" \
            "$(field metadata_bytes "$work/$turn.json")" $((SECONDS - began))
        rm -r "$work/out/$turn"
    done
    if [ -s "$work/third.packages" ]; then
        for turn in second third; do
            bytes=$(field upstream_bytes "$work/$turn.json")
            if [ "$bytes" = 0 ]; then ok "the $turn took no byte from upstream"; else wrong "the $turn took $bytes bytes"; fi
            if cmp -s "$work/first.packages" "$work/$turn.packages"; then
                ok "the $turn has the same $(wc -l <"$work/$turn.packages") packages as the first"
            else
                wrong "the $turn has other packages than the first:"
                diff "$work/first.packages" "$work/$turn.packages" >&2 || true
            fi
        done
        files() { sed -n '/^\[\[files\]\]/,$p' "$work/out/$1.lock" | grep '^sha256' | sort; }
        if [ "$(files second)" = "$(files third)" ]; then
            ok "the third went on the same $(files third | wc -l) files as the second, by their digests"
        else
            wrong "the third went on other files than the second"
        fi
    else
        wrong "there is no third build to compare"
    fi
    rm -rf "$work/recipes" "$work"/*.packages "$work"/*.json "$work"/*.log "$work"/out/*
done
exit "$failed"

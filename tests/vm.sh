#!/bin/bash
# `make test-vm`: tests as root in a virtual machine that is thrown away, on Debian's own kernel under
# systemd. Needs no root itself.
#
#   vm.sh full|short PROGRAMS
#
#   full    the units as they are shipped, the privileged tests with private and with shared mounts,
#           and the tests that need a host to themselves
#   short   the units, and the tests that need a host to themselves
#
# PROGRAMS is the folder in cargo's target directory with hostler, hostlerd and hostler-vm. From the
# environment: TESTS=TEXT runs only tests with that in their names; NOT_YET=yes also those that are
# known not to pass yet; SUITES names suites (see tests/vm/run-tests.sh); APPEND is for the kernel's
# command line, such as systemd.unified_cgroup_hierarchy=0; IMAGE is a folder with an image.
set -euo pipefail

extent=${1:?full or short}
programs=$(realpath "${2:?the folder with hostler, hostlerd and hostler-vm}")
here=$(dirname "$(realpath "$0")")
work=$(dirname "$programs")/vm

case $extent in
full) suites="units privileged privileged-shared guest" total=120min ;;
short) suites="units guest" total=20min ;;
*)
    echo "vm: $extent is neither full nor short" >&2
    exit 2
    ;;
esac
[ -z "${TESTS:-}" ] || suites="privileged guest"
suites=${SUITES:-$suites}

# The tests themselves: where cargo put them is what it says.
puts=()
for target in privileged guest; do
    case " $suites" in *" $target"*) ;; *) continue ;; esac
    binary=$(cd "$here/.." && "${CARGO:-cargo}" test --locked --quiet --package hostler-tests --test "$target" \
        --no-run --message-format=json | sed -n "s/.*\"executable\":\"\\([^\"]*\\/$target-[^\"]*\\)\".*/\\1/p" | tail -n 1)
    [ -x "$binary" ] || {
        echo "vm: cargo does not say where it put the tests $target" >&2
        exit 1
    }
    puts+=(--put "$binary=deps/$target")
done
image=${IMAGE:-$("$here/vm/image.sh" "$programs/hostler" "$work")}
for unit in "$here"/../systemd/*; do
    puts+=(--put "$unit=systemd/${unit##*/}")
done
# In this process's stead: whoever ends this one ends the machine.
# shellcheck disable=SC2086  # suites are words
exec "$programs/hostler-vm" --image "$image" --work "$work" --total "$total" --no-progress 5min \
    --append "${APPEND:-}" "${puts[@]}" \
    --put "$programs/hostler=hostler" --put "$programs/hostlerd=hostlerd" \
    --put "$here/vm/run-tests.sh=run-tests.sh" --put "$here/vm/units.sh=units.sh" \
    --put "$here/vm/left-out=left-out" --put "$here/chroot-builder.sh=chroot-builder.sh" \
    -- env "TESTS=${TESTS:-}" "NOT_YET=${NOT_YET:-}" bash ./run-tests.sh $suites

#!/bin/bash
# Runs in the guest of `make test-vm`: the suites that are named, with a verdict on each at the end.
#
#   run-tests.sh SUITE…
#
#   units               the watchdog under systemd, by the units as they are shipped
#   privileged          the privileged tests
#   privileged-shared   the same with mounts that propagate, as on a host that systemd set up
#   guest               the tests that need the host to themselves
#
# TESTS=TEXT runs only tests with that in their names, NOT_YET=yes also those that say that they cannot
# pass yet. Exit status 0 only if all that was to run was run, and passed.
set -u
cd /mnt || exit
said=$(mktemp -d)
failed=0
ran=0
verdicts=()

verdict() { # verdict SUITE WORDS…
    verdicts+=("$(printf '%-18s %s' "$1" "${*:2}")")
}

run_units() {
    local start=$SECONDS
    if bash ./units.sh 2>&1 | tee "$said/units"; [ "${PIPESTATUS[0]}" = 0 ]; then
        ran=$((ran + 1))
        verdict units "$(grep -c '^units: ok: ' "$said/units") checks hold ($((SECONDS - start)) s)"
    else
        failed=1
        verdict units "FAILED: $(grep -c '^units: WRONG: ' "$said/units") checks do not hold ($((SECONDS - start)) s)"
    fi
}

run_target() { # run_target SUITE TARGET
    local suite=$1 target=$2 start=$SECONDS arguments=(--show-output) which test reason passed left=0
    "deps/$target" --list >"$said/list" || {
        echo "vm: deps/$target does not run here; is it made for a newer C library than Debian 12's?"
        failed=1
        verdict "$suite" "FAILED: it does not run"
        return
    }
    while read -r which test reason; do
        [ "$which" = "$target" ] || [ "$which" = "$suite" ] || continue
        grep -qxF "$test: test" "$said/list" || {
            echo "vm: tests/vm/left-out names $test, and $target has no such test"
            failed=1
        }
        echo "vm: $suite: left out: $test: $reason"
        arguments+=(--skip "$test")
        left=$((left + 1))
    done <left-out
    [ "${NOT_YET:-}" != yes ] || arguments+=(--include-ignored)
    [ -z "${TESTS:-}" ] || arguments+=("$TESTS")
    "deps/$target" "${arguments[@]}" 2>&1 | tee "$said/$suite"
    local status=${PIPESTATUS[0]}
    passed=$(sed -n 's/^test result: ok\. \([0-9]*\) passed; 0 failed; .*/\1/p' "$said/$suite")
    if [ "$status" = 0 ] && [ -n "$passed" ]; then
        ran=$((ran + passed))
        verdict "$suite" "$passed passed, $left left out ($((SECONDS - start)) s)"
    else
        failed=1
        verdict "$suite" "FAILED ($((SECONDS - start)) s): $(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$said/$suite" | tr '\n' ' ')"
    fi
}

# What no suite may leave: the machine had none of it when it came up.
left_behind() {
    losetup --noheadings --output NAME,BACK-FILE
    ls -d /sys/block/dm-* /sys/block/md* /sys/block/nbd*/pid
    # The host's own namespace, and those of services.
    cat /proc/[0-9]*/mountinfo | grep -F hostler-tests- | cut -d ' ' -f 3,5 | sort -u
    find "/sys/fs/cgroup$(cut -d : -f 3 /proc/self/cgroup)" -mindepth 1 -type d -print -exec cat {}/cgroup.procs \;
    ls -d /tmp/hostler-tests-* /var/tmp/*.image
} 2>/dev/null

for suite; do
    echo "vm: == $suite"
    case $suite in
    units) run_units ;;
    privileged) run_target privileged privileged ;;
    privileged-shared) HOSTLER_TESTS_PROPAGATION=shared run_target privileged-shared privileged ;;
    guest) run_target guest guest ;;
    *)
        echo "vm: there is no suite $suite; they are units, privileged, privileged-shared, guest"
        failed=1
        ;;
    esac
    left=$(left_behind)
    if [ -n "$left" ]; then
        echo "vm: $suite left behind:"
        sed 's/^/vm:   /' <<<"$left"
        verdict "$suite" "FAILED: it left something behind"
        failed=1
    fi
done

echo "vm: == verdicts"
for line in "${verdicts[@]}"; do
    echo "vm: $line"
done
# What a test says of itself: ignored, not yet: REASON.
cat "$said"/* | sed -n 's/^test \(.*\) \.\.\. ignored, not yet: \(.*\)/vm: not yet            \1: \2/p' | sort -u
if [ "$ran$failed" = 00 ]; then
    echo "vm: nothing passed${TESTS:+; is \"$TESTS\" in the name of any test?}"
    failed=1
fi
exit "$failed"

#!/bin/bash
# Checks what cargo does not: scripts, units, alert rules, the size of files.
set -euo pipefail
cd "$(dirname "$0")/.."

git ls-files '*.sh' .ci/run | grep -v '^runner/src/' | xargs shellcheck --severity=warning
# The guest's scripts are pieces that a recipe's build puts together, for busybox and Debian's sh:
# no first line of their own, variables of each other's.
git ls-files 'runner/src/*.sh' |
    xargs shellcheck --severity=warning --shell=dash --exclude=SC1007,SC2148,SC2154,SC2187

# systemd-analyze wants the programs of a unit to be there; any that is does for this.
units=$(mktemp -d)
trap 'rm -r "$units"' EXIT
cp systemd/hostlerd.socket "$units"
sed 's#/usr/bin/hostlerd#/bin/true#' systemd/hostlerd.service >"$units/hostlerd.service"
said=$(systemd-analyze verify --man=no "$units/hostlerd.service" "$units/hostlerd.socket" 2>&1) || {
    echo "$said"
    exit 1
}
if [ -n "$said" ]; then
    echo "$said"
    exit 1
fi
promtool check rules systemd/prometheus-rules.yml

# Directives that would keep the daemon's unmounts from the host, or break it.
if grep -nE '^(Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc)|ProcSubset|Private(Tmp|Devices|Mounts|IPC)|MountFlags|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths|Bind(ReadOnly)?Paths|Root(Directory|Image)|TemporaryFileSystem|RestrictSUIDSGID)=' systemd/hostlerd.service; then
    echo "lint: see the unit's comments: that keeps the daemon's unmounts from the host, or openat2 from the daemon" >&2
    exit 1
fi

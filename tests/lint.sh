#!/bin/bash
# Checks what cargo does not: scripts, units, alert rules, the size of files.
set -euo pipefail
cd "$(dirname "$0")/.."

git ls-files '*.sh' .ci/run | xargs shellcheck --severity=warning

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

# Directives that would keep the daemon's unmounts from the host.
if grep -nE '^(Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc)|ProcSubset|Private(Tmp|Devices|Mounts|IPC)|MountFlags|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths|Bind(ReadOnly)?Paths|Root(Directory|Image)|TemporaryFileSystem)=' systemd/hostlerd.service; then
    echo "lint: that gives hostlerd a mount namespace of its own; what it unmounts there stays mounted on the host" >&2
    exit 1
fi

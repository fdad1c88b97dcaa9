#!/bin/busybox sh
# Proves that the machine really executes a kernel and a program.
read -r nonce </nonce
echo "hostler-canary $nonce"
/bin/busybox poweroff -f
/bin/busybox sleep 60

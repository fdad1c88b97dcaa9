"""Becomes a program in which one system call never returns: hang.py CALL (REQUEST|any) PROGRAM ARGUMENT..."""
import ctypes
import os
import struct
import sys

call, request, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000


def instruction(code, value, if_so=0, if_not=0):
    return struct.pack("HBBI", code, if_so, if_not, value)


# Whoever makes the call waits for an answer of whoever holds the listener, and nobody answers.
checks = [(0, call)] if request == "any" else [(0, call), (24, int(request))]
program = b""
for done, (place, value) in enumerate(checks):
    left = len(checks) - done - 1
    program += instruction(LOAD, place) + instruction(EQUAL, value, 0, 2 * left + 1)
program += instruction(RETURN, NOTIFY) + instruction(RETURN, ALLOW)
buffer = ctypes.create_string_buffer(program)
filter_program = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
SYS_SECCOMP, SET_MODE_FILTER, NEW_LISTENER = 317, 1, 8
listener = libc.syscall(SYS_SECCOMP, SET_MODE_FILTER, NEW_LISTENER, filter_program)
if listener < 0:
    sys.exit("seccomp: " + os.strerror(ctypes.get_errno()))
os.set_inheritable(listener, True)
os.execvp(command[0], command)

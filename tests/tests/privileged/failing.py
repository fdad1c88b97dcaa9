"""Becomes a program in which one system call fails while a file is there: failing.py CALL ERROR FILE PROGRAM ARGUMENT..."""
import ctypes
import fcntl
import os
import struct
import sys

call, error, file, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
NOTIF_RECV, NOTIF_SEND, CONTINUE = 0xC0502100, 0xC0182101, 1


def instruction(code, value, if_so=0, if_not=0):
    return struct.pack("HBBI", code, if_so, if_not, value)


program = instruction(LOAD, 0) + instruction(EQUAL, call, 0, 1)
program += instruction(RETURN, NOTIFY) + instruction(RETURN, ALLOW)
buffer = ctypes.create_string_buffer(program)
filter_program = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
SYS_SECCOMP, SET_MODE_FILTER, NEW_LISTENER, SET_PDEATHSIG, SIGKILL = 317, 1, 8, 1, 9
listener = libc.syscall(SYS_SECCOMP, SET_MODE_FILTER, NEW_LISTENER, filter_program)
if listener < 0:
    sys.exit("seccomp: " + os.strerror(ctypes.get_errno()))
becomes_it = os.getpid()
if os.fork() != 0:
    os.close(listener)
    os.execvp(command[0], command)
# Who answers ends with the program.
libc.prctl(SET_PDEATHSIG, SIGKILL)
while os.getppid() == becomes_it:
    asked = bytearray(80)
    try:
        fcntl.ioctl(listener, NOTIF_RECV, asked)
        (number,) = struct.unpack_from("Q", asked)
        fails = os.path.exists(file)
        answer = struct.pack("Qqii", number, 0, -error if fails else 0, 0 if fails else CONTINUE)
        fcntl.ioctl(listener, NOTIF_SEND, answer)
    except OSError:
        # Whoever asked has ended meanwhile.
        continue

"""Binds a loop device to two files in turn, as fast as it can, and counts how often somebody else
detached the second. Prints "ready", then on a line on its standard input the two counts, and ends."""
import errno, fcntl, os, random, select, struct, sys, time

ADD, REMOVE, CONFIGURE, CLEAR, STATUS = 0x4C80, 0x4C81, 0x4C0A, 0x4C01, 0x4C05
AUTOCLEAR = 4
number, ours, theirs = int(sys.argv[1]), sys.argv[2], sys.argv[3]
control = os.open("/dev/loop-control", os.O_RDWR)
fcntl.ioctl(control, ADD, number)
node = f"/dev/loop{number}"
files = [(os.open(ours, os.O_RDONLY), False), (os.open(theirs, os.O_RDONLY), True)]


def bind(file):
    """Binds the device, and returns it open: from then on it is this process's binding."""
    while True:
        device = os.open(node, os.O_RDONLY)
        try:
            fcntl.ioctl(device, CONFIGURE, struct.pack("II", file, 0) + bytes(232 + 64))
            return device
        except OSError as error:
            os.close(device)
            if error.errno not in (errno.EBUSY, errno.ENXIO):
                raise
            time.sleep(0)


print("ready", flush=True)
bindings = foreign = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    for file, must_stay in files:
        device = bind(file)
        bindings += 1
        for _ in range(random.randrange(3)):
            time.sleep(0)
        if must_stay:
            try:
                status = fcntl.ioctl(device, STATUS, bytes(232))
                if struct.unpack_from("I", status, 52)[0] & AUTOCLEAR:
                    foreign += 1
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                foreign += 1
        try:
            fcntl.ioctl(device, CLEAR)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        os.close(device)
for _ in range(200):
    try:
        fcntl.ioctl(control, REMOVE, number)
        break
    except OSError:
        time.sleep(0.01)
print(bindings, foreign, flush=True)

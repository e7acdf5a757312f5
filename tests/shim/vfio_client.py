"""A user-space driver of `edu` that knows nothing of the model: the standard library only, every struct by hand.

It prints what a real kernel prints too. It reaches the registers by pread and pwrite on the device's file.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
import time

PAGE = 4096
BAR0, CONFIG = 0 << 40, 7 << 40


def call(what, fd, request, layout, *values):
    """Make an ioctl and say what came of it; the struct's values after it."""
    block = bytearray(struct.pack(layout, *values))
    try:
        print(what, fcntl.ioctl(fd, request, block))
    except OSError as error:
        print(what, errno.errorcode[error.errno])
    return struct.unpack(layout, block)


def pinned():
    """VmPin in pages, against what it was at the start."""
    with open(f"/proc/{os.getpid()}/status") as status:
        return next(int(line.split()[1]) // 4 for line in status if line.startswith("VmPin:"))


def transfer(source, target, count, command):
    for register, value in ((0x80, source), (0x88, target), (0x90, count), (0x98, command | 1)):
        os.pwrite(device, struct.pack("<Q", value), BAR0 + register)
    while os.pread(device, 8, BAR0 + 0x98)[0] & 1:
        time.sleep(0.01)


def edu_copy(source, target, count):
    """Memory to memory by the device's DMA engine, through its buffer."""
    transfer(source, 0x40000, count, 0)
    transfer(0x40000, target, count, 2)


before = pinned()
iommu = os.open("/dev/iommu", os.O_RDWR)
device = os.open("/dev/vfio/devices/vfio0", os.O_RDWR)
print("a read before the bind", end=" ")
try:
    print(len(os.pread(device, 4, CONFIG)))
except OSError as error:
    print(errno.errorcode[error.errno])
call("bind to no iommufd", device, 0x3B76, "<IIiI", 16, 0, device, 0)
call("bind", device, 0x3B76, "<IIiI", 16, 0, iommu, 0)
print("flags, regions, irqs", call("info", device, 0x3B6B, "<IIIIII", 24, 0, 0, 0, 0, 0)[1:4])
print("region 0", call("region", device, 0x3B6C, "<IIIIQQ", 32, 0, 0, 0, 0, 0)[4:])
print("vendor, device", struct.unpack("<HH", os.pread(device, 4, CONFIG)))
os.pwrite(device, struct.pack("<H", 6), CONFIG + 4)
print("ident", os.pread(device, 4, BAR0).hex()[:4])
ioas = call("ioas", iommu, 0x3B81, "<III", 12, 0, 0)[2]
call("attach", device, 0x3B77, "<III", 12, 0, ioas)

memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
call("map", iommu, 0x3B85, "<IIIIQQQ", 40, 7, ioas, 0, address, 4 * PAGE, 0x100000)
print("pages pinned", pinned() - before)
memory[0:12] = b"by the bus\n."
edu_copy(0x100000, 0x100000 + 2 * PAGE, 12)
print("copied by DMA", memory[2 * PAGE : 2 * PAGE + 12])
memory[0:4] = b"new\n"
edu_copy(0x100000, 0x200000, 4)  # refused: nothing is mapped there
print("and no more", memory[2 * PAGE : 2 * PAGE + 12])

ready = os.eventfd(0, os.EFD_NONBLOCK)
call("msi", device, 0x3B6E, "<IIIIIi", 24, 0x24, 1, 0, 1, ready)
os.pwrite(device, struct.pack("<I", 1), BAR0 + 0x60)
print("interrupt", select.select([ready], [], [], 5)[0] == [ready], struct.unpack("<Q", os.read(ready, 8)))
os.pwrite(device, struct.pack("<I", 1), BAR0 + 0x64)
print("unmapped", call("unmap", iommu, 0x3B86, "<IIQQ", 24, ioas, 0x100000, 4 * PAGE)[3])
print("pages pinned", pinned() - before)
call("map", iommu, 0x3B85, "<IIIIQQQ", 40, 7, ioas, 0, address, PAGE, 0x100000)
os.close(device)
os.close(iommu)
print("pages pinned after the last close", pinned() - before)

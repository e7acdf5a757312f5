"""A fuzzed program as Python that a person can paste: `uapi` calls, memory by mmap, nothing of the fuzzer."""

from __future__ import annotations

from typing import Any

from iommulab.fuzz.memory import MEMFD, PAGE, REGIONS
from iommulab.fuzz.program import EDU_CALLS, MAIN_FD, TEST_OPS, Call, Program
from uapi.iommufd_test import TEST_OP_MEMBERS

_MEMBER = {TEST_OPS[op]: member for op, member in TEST_OP_MEMBERS.items()}

_HEAD = """\
import ctypes, errno, mmap, os
from uapi.ioctl import Ioctl
from uapi.iommufd import *
from uapi.iommufd_test import *
from uapi.vfio import *
from uapi.linux import LinuxBackend
from kernel_model.kernel import Kernel

kernel = LinuxBackend()  # or Kernel("mock")
iommu = kernel.open("/dev/iommu")

def call(ioctl, arg=None, tail=b"", file=None, **fields):
    data = bytes(ioctl.make()) + tail if ioctl.struct else b"0"
    room = ctypes.create_string_buffer(data, len(data))
    block = (ioctl.struct or ctypes.c_char).from_buffer(room)
    for name, value in fields.items():
        inner, _, last = name.rpartition("__in__")
        setattr(getattr(block, inner) if inner else block, last, value)
    try:
        result = ioctl.raw(iommu if file is None else kernel.adopt(file), room if arg is None else arg)
        print(ioctl.name, "=", result)
        block.result_fd = result
    except OSError as error:
        print(ioctl.name, errno.errorcode[error.errno])
    return block

def put(data):
    keep.append(ctypes.create_string_buffer(data, len(data)))
    return ctypes.addressof(keep[-1])

def told(name, function, *arguments):
    try:
        print(name, "=", result := function(*arguments))
        return result
    except OSError as error:
        print(name, errno.errorcode[error.errno])
        return b""

keep = []
"""

_DEVICES = """
from types import SimpleNamespace
from conformance.drivers.edu import edu_functions
from conformance.drivers.vfio import node, take
from iommulab.fuzz import edu_steps

class door:  # what edu_steps.run takes
    pread = staticmethod(lambda fd, count, offset: kernel.adopt(fd).pread(count, offset))
    pwrite = staticmethod(lambda fd, data, offset: kernel.adopt(fd).pwrite(data, offset))

nodes = edu_functions(kernel)
for address in nodes:
    take(kernel, address)

def poke(address, length, words):
    ctypes.memset(address, 0, length)
    for offset, word in words.items():
        ctypes.c_uint64.from_address(address + offset).value = word

"""


def _region(name: str) -> list[str]:
    pages = REGIONS[name][1]
    size = f"{pages} * {PAGE}"
    if name == "file":
        return [
            'memfd = os.memfd_create("file")',
            f"os.ftruncate(memfd, {size})",
            f"file_map = mmap.mmap(memfd, {size})",
            "file = ctypes.addressof(ctypes.c_char.from_buffer(file_map))",
        ]
    if name in ("hole", "gap"):
        return [f"{name} = {REGIONS[name][0]:#x}  # nothing is mapped here"]
    lines = [f"keep.append(kernel.buffer({size}))", f"{name} = keep[-1].address"]
    if name in ("ro", "none"):
        lines.append(f"ctypes.memset({name}, 1, {size})")
        lines.append(f"ctypes.CDLL(None).mprotect(ctypes.c_void_p({name}), {size}, {int(name == 'ro')})")
    return lines


def _value(value: Any, calls: list[Call]) -> str:
    if isinstance(value, int):
        return str(value) if value < 10 else ("memfd" if value == MEMFD else hex(value))
    if value == MAIN_FD:
        return "iommu.fileno()"
    if value[0] == "@":
        index, _, name = value[1:].partition(".")
        if int(index) >= len(calls):
            return "0"
        if ":" in name:
            name, _, inside = name.partition(":")
            return f"ctypes.c_uint64.from_address(c{index}.{_field(calls[int(index)].name, name)} + {inside}).value"
        if name.isdigit():
            return f"int.from_bytes(c{index}[{name}:{int(name) + 4}], 'little')"
        return f"c{index}.{_field(calls[int(index)].name, name)}"
    if value[0] == "&":
        name, _, offset = value[1:].partition("+")
        return name if offset in ("", "0x0", "0") else f"{name} + {offset}"
    if value[0] == "*":
        return f"put(bytes.fromhex({value[1:]!r}))"
    length, _, skew = value[1:].partition("+")
    return f"put(bytes({int(length) + int(skew or 0)}))" + (f" + {skew}" if skew and skew != "0" else "")


def _field(name: str, field: str) -> str:
    member = _MEMBER.get(name)
    if member is None or field in ("size", "op", "id", "__reserved", "last", "result_fd"):
        return field
    return f"{member}.{'id' if field == 'index' else field}"


def _line(call: Call, calls: list[Call]) -> str:
    fields = call.fields
    if not call.is_ioctl:
        if call.name in ("munmap", "mprotect"):
            more = f", {fields['prot']}" if call.name == "mprotect" else ""
            where = _value(fields["address"], calls)
            return f"ctypes.CDLL(None).{call.name}(ctypes.c_void_p({where}), {fields['length']}{more})"
        if call.name == "poke":
            where = _value(fields["address"], calls)
            words = ", ".join(f"{at:#x}: {word:#x}" for at, word in fields["words"])
            return f"poke({where}, {fields['length']}, {{{words}}})"
        if call.name in ("open", "eventfd") or call.name in EDU_CALLS or call.name in ("pread", "pwrite"):
            return _device_line(call, calls)
        if call.name == "mmap":
            offset = _value(fields["offset"], calls)
            file = f"kernel.adopt({_value(fields['fd'], calls)})" if "fd" in fields else "iommu"
            return f"told('mmap', {file}.mmap, {fields['length']}, {offset}, {fields['prot']}, {fields['flags']})"
        fd = _value(fields["fd"], calls)
        if call.name == "read":
            return f"kernel.adopt({fd}).read({fields['count']})"
        if call.name == "write":
            words = " + ".join(f"({_value(word, calls)}).to_bytes(4, 'little')" for word in fields["words"])
            return f"kernel.adopt({fd}).write({words})"
        return f"kernel.adopt({fd}).poll(0x45)" if call.name == "poll" else f"os.close({fd})"
    said = []
    member = _MEMBER.get(call.name)
    if member is not None and "op" not in fields:
        said.append(f"op={call.name}")
    for name, value in fields.items():
        key = _field(call.name, name).replace(".", "__in__")
        said.append(f"{key}={_value(value, calls)}")
    if call.arg is not None:
        said.insert(0, _value(call.arg, calls))
    if call.file is not None:
        said.append(f"file={_value(call.file, calls)}")
    if call.tail:
        said.append(f"tail=bytes.fromhex({call.tail!r})")
    name = "IOMMU_TEST_CMD" if member else call.name
    if name.startswith("RAW_"):
        name = f'Ioctl("RAW", {name[4:]}, iommu_ioas_alloc)'
    return f"call({', '.join([name, *said])})"


def _device_line(call: Call, calls: list[Call]) -> str:
    fields = call.fields
    if call.name == "open" and fields.get("device", 0) < 0:
        return "SimpleNamespace(fd=kernel.open('/dev/iommu').fileno())"
    if call.name == "open":
        return f"SimpleNamespace(fd=kernel.open(node(kernel, nodes[{fields.get('device', 0)}])).fileno())"
    if call.name == "eventfd":
        return "SimpleNamespace(fd=os.eventfd(0, os.EFD_NONBLOCK))"
    fd = _value(fields["fd"], calls)
    if call.name == "pread":
        return f"told('pread', door.pread, {fd}, {fields['count']}, {fields['offset']:#x})"
    if call.name == "pwrite":
        return f"told('pwrite', door.pwrite, {fd}, bytes.fromhex({fields['data'][1:]!r}), {fields['offset']:#x})"
    kind, names = EDU_CALLS[call.name]
    numbers = [_value(fields.get(name, 0), calls) for name in names] + ["0"] * (3 - len(names))
    return f"told({call.name!r}, edu_steps.run, door, {fd}, {kind}, {', '.join(numbers)})"


def as_python(program: Program, machine: str = "mock") -> str:
    """The program as a script that prints each call's result."""
    text = repr([call.to_json() for call in program.calls])
    regions = [line for name in REGIONS if f"&{name}" in text for line in _region(name)]
    if "memfd" not in "\n".join(regions) and str(MEMFD) in text:
        regions += _region("file")
    lines = []
    for index, call in enumerate(program.calls):
        used = f"@{index}." in text
        lines.append((f"c{index} = " if used else "") + _line(call, program.calls))
    head = _HEAD if machine == "mock" else _HEAD.replace('Kernel("mock")', f'Kernel("{machine}")') + _DEVICES
    return head + "\n".join([*regions, *lines]) + "\n"

"""One thing wrong with a call that would have succeeded."""

from __future__ import annotations

from iommulab.fuzz.memory import MEMFD, NULL_FD, PAGE
from iommulab.fuzz.program import LAYOUTS, Call, Value
from iommulab.fuzz.world import World
from uapi.vfio import VFIO_DEVICE_FEATURE_DMA_BUF

U64_MAX = (1 << 64) - 1
#: Fields that are pointers, those that are ids, those whose value is a size or an address of the IO side.
POINTERS = {"allowed_iovas", "data_uptr", "data", "uptr", "user_va", "vaddr", "token_uuid_ptr"}
IDS = {
    "id", "ioas_id", "dst_ioas_id", "src_ioas_id", "object_id", "dev_id", "pt_id", "hwpt_id", "fault_id", "viommu_id",
}  # fmt: skip
NUMBERS = {"length", "iova", "dst_iova", "src_iova", "start", "page_size", "nesting_parent_iova", "size"}
#: Numbers at edges. Nothing between 2^20 and 2^48: a length that really works through memory takes time.
EDGES = (0, 1, 3, 511, 2047, PAGE - 1, PAGE + 1, 1 << 48, 1 << 63, U64_MAX - PAGE, U64_MAX - 1, U64_MAX)
BAD_POINTERS = (
    "&hole+0x10",
    "&none+0",
    "&buf+0x1ffff",
    "&ro+0",
    0,
    1 << 63,
    U64_MAX - 7,
    "&work+0xfffc",
    "&file+0xfffd",
)
#: Operations whose `id` says which mock device dies or gets a PASID: a wrong one is a matter of its own.
KEEP_ID = ("IOMMU_TEST_OP_PASID_ATTACH", "IOMMU_TEST_OP_PASID_REPLACE")
#: Flags that exist somewhere, and some that do not.
FLAGS = (1, 2, 4, 8, 16, 1 << 31)


def spoil(call: Call, world: World) -> bool:
    """Change one field of the call; False where nothing was found to change."""
    rng = world.rng
    layout = LAYOUTS[call.name]
    kind = rng.random()
    if kind < 0.004 and call.name.startswith("IOMMU_TEST"):
        call.fields["op"] = rng.choice((0, 24, 0xFFFFFFFF))
        return True
    if kind < 0.08 and "size" in layout.fields and call.name[:5] != "VFIO_":
        return _size(call, world)
    if kind < 0.08 and call.name[:12] == "VFIO_DEVICE_" and "argsz" in layout.fields:
        call.fields["argsz"] = rng.choice((0, 3, layout.size - 4, layout.size - 1, layout.size + 8, 4096, 1 << 31))
        return True
    if kind < 0.11:
        call.arg = rng.choice(("&hole+0", "&none+8", "&buf+0x1fffe", "&ro+0", 0, 1 << 47, U64_MAX - 3))
        return True
    keep = {"size", "argsz", "last", "result_fd"} | ({"op"} if call.name.startswith("IOMMU_TEST") else set())
    names = [name for name in layout.fields if name not in keep and name[:4] != "out_"]
    if call.name in KEEP_ID and "id" in names:
        names.remove("id")
    if not names:
        return False
    name = rng.choice(names)
    old = call.fields.get(name, 0)
    new: Value
    if name in IDS or name.endswith("_id"):
        new = _wrong_id(call, world)
    elif name in POINTERS:
        new = rng.choice(BAD_POINTERS)
    elif name in NUMBERS:
        new = rng.choice(EDGES)
        if isinstance(old, int) and rng.random() < 0.5:
            new = max(old + rng.choice((1, -1, 2048, -2048, 512, PAGE, -PAGE)), 0)
    elif name == "iommufd":
        files: list[Value] = [*(file.fd for file in world.files), *world.eventfds]
        new = rng.choice([*files, MEMFD, 950, (1 << 32) - 1])
    elif name in ("fd", "dmabuf_fd") or (
        call.name == "VFIO_DEVICE_SET_IRQS" and name[:4] == "data"
    ):  # numbers that are the same file, or none, in every process
        new = rng.choice((MEMFD, NULL_FD, 950, (1 << 31) - 1, (1 << 32) - 1))
    elif name == "op":
        new = rng.choice((1, 2, 3, 4, 0xFFFF))
    elif "flags" in name:
        new = (old if isinstance(old, int) else 0) ^ rng.choice(FLAGS)
    elif "reserved" in name:
        new = rng.choice((1, 1 << 7))
    elif name in ("entry_num", "num_iovas", "data_len", "entry_len", "veventq_depth"):
        new = rng.choice((0, 1, 2, 3, 7, 4097, (1 << 32) - 1))
    else:
        new = rng.choice((0, 1, 2, 3, 5, 0xDEAD, (1 << 31) - 1, (1 << 32) - 1))
    call.fields[name] = new
    return _allowed(call)


def _wrong_id(call: Call, world: World) -> Value:
    rng = world.rng
    known: list[Value] = list(world.ids())
    if call.name.startswith("IOMMU_TEST_OP_ACCESS") or call.name == "IOMMU_TEST_OP_DESTROY_ACCESS_PAGES":
        known += [queue.fd for queue in world.faults + world.events] + [NULL_FD]
        known += [access.fd for access in world.accesses]
    if known and rng.random() < 0.75:
        return rng.choice(known)
    return rng.choice((0, 50, 0x7FFFFFFF, 0xFFFFFFFF))


def _size(call: Call, world: World) -> bool:
    size = LAYOUTS[call.name].size
    kind = world.rng.randrange(6)
    if kind == 0:
        call.fields["size"] = world.rng.choice((0, 3, 4, 8, size - 1, size - 4, size - 8))
    elif kind == 1:
        call.fields["size"] = world.rng.choice((size - 8, size - 16, 24, 28, 32))
    elif kind == 2:
        call.fields["size"] = 0xFFFFFFFF
    else:
        more = world.rng.choice((1, 8, 40))
        call.fields["size"] = size + more
        call.tail = "00" * (more - 1) + world.rng.choice(("00", "00", "01"))
    return True


def _allowed(call: Call) -> bool:
    """Take back what the kernel itself does not stand, or what would be chance."""
    fields = call.fields
    length, number = fields.get("length", 0), fields.get("entry_num", 0)
    if call.name == "IOMMU_IOAS_MAP" and isinstance(length, int) and length >= U64_MAX - 2 * PAGE:
        fields["user_va"] = 0  # off a page it is a WARN in iopt_insert_area()
    if call.name == "IOMMU_HWPT_INVALIDATE" and isinstance(number, int) and number > 4097:
        fields["entry_num"] = (1 << 19) + 1
    if call.name == "IOMMU_HW_QUEUE_ALLOC":
        within_a_page(call)
    if call.name == "VFIO_DEVICE_FEATURE" and fields.get("flags", 0) & 0xFFFF == VFIO_DEVICE_FEATURE_DMA_BUF:
        fields["flags"] ^= VFIO_DEVICE_FEATURE_DMA_BUF  # the model has none of VFIO
    return True


def within_a_page(call: Call) -> None:
    """Cut a hardware queue to one page: whether its pages are neighbours in memory is chance on a real kernel."""
    iova, length = call.fields.get("nesting_parent_iova", 0), call.fields.get("length", 0)
    room = PAGE - iova % PAGE if isinstance(iova, int) else 1
    if isinstance(length, int) and room < length < 1 << 40:
        call.fields["length"] = room

"""The ABI of iommufd's mock driver (CONFIG_IOMMUFD_TEST) at Linux 7.3.

Mirrors drivers/iommu/iommufd/iommufd_test.h, which is no uapi header and may change in any release. Left out: nothing.
The headers of 6.12.95, 6.12.117, 7.2.13 and 7.3.4 were looked at. UNVERIFIED: where they leave it open, `since` is the
release that brought the feature which the command tests.
"""

from ioctl_opt import IO

from uapi.constants import Constants, const
from uapi.cstruct import Struct, Union, aligned_u64, anonymous, cstruct, s32, since, u32, u64
from uapi.ioctl import Ioctl
from uapi.iommufd import IOMMUFD_CMD_BASE, IOMMUFD_TYPE

HEADER = "iommufd_test.h"
CONSTANTS = Constants(__name__)

with CONSTANTS.enum(since="6.2"):
    IOMMU_TEST_OP_ADD_RESERVED = 1
    IOMMU_TEST_OP_MOCK_DOMAIN = 2
    IOMMU_TEST_OP_MD_CHECK_MAP = 3
    IOMMU_TEST_OP_MD_CHECK_REFS = 4
    IOMMU_TEST_OP_CREATE_ACCESS = 5
    IOMMU_TEST_OP_DESTROY_ACCESS_PAGES = 6
    IOMMU_TEST_OP_ACCESS_PAGES = 7
    IOMMU_TEST_OP_ACCESS_RW = 8
    IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT = 9
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE = const(10, since="6.6")
    IOMMU_TEST_OP_ACCESS_REPLACE_IOAS = const(11, since="6.6")
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS = const(12, since="6.7")
    IOMMU_TEST_OP_DIRTY = const(13, since="6.7")
    IOMMU_TEST_OP_MD_CHECK_IOTLB = const(14, since="6.8")
    IOMMU_TEST_OP_TRIGGER_IOPF = const(15, since="6.11")
    IOMMU_TEST_OP_DEV_CHECK_CACHE = const(16, since="6.13")
    IOMMU_TEST_OP_TRIGGER_VEVENT = const(17, since="6.15")
    IOMMU_TEST_OP_PASID_ATTACH = const(18, since="6.15")
    IOMMU_TEST_OP_PASID_REPLACE = const(19, since="6.15")
    IOMMU_TEST_OP_PASID_DETACH = const(20, since="6.15")
    IOMMU_TEST_OP_PASID_CHECK_HWPT = const(21, since="6.15")
    IOMMU_TEST_OP_DMABUF_GET = const(22, since="7.2")
    IOMMU_TEST_OP_DMABUF_REVOKE = const(23, since="7.2")

with CONSTANTS.enum(since="6.19"):
    MOCK_IOMMUPT_DEFAULT = 0
    MOCK_IOMMUPT_HUGE = 1

with CONSTANTS.enum(since="6.2"):
    MOCK_APERTURE_START = 1 << 24
    MOCK_APERTURE_LAST = (1 << 31) - 1
    #: Before 6.19 the driver kept the two to itself.
    MOCK_PAGE_SIZE = const(2048, since="6.19")
    MOCK_HUGE_PAGE_SIZE = const(512 * MOCK_PAGE_SIZE, since="6.19")

with CONSTANTS.enum(since="6.2"):
    MOCK_FLAGS_ACCESS_WRITE = 1 << 0
    MOCK_FLAGS_ACCESS_SYZ = 1 << 16

with CONSTANTS.enum(since="6.2"):
    MOCK_ACCESS_RW_WRITE = 1 << 0
    MOCK_ACCESS_RW_SLOW_PATH = 1 << 2

with CONSTANTS.enum(since="6.2"):
    MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES = 1 << 0

with CONSTANTS.enum(since="6.7"):
    MOCK_FLAGS_DEVICE_NO_DIRTY = 1 << 0
    MOCK_FLAGS_DEVICE_HUGE_IOVA = const(1 << 1, since="6.8", until="6.19")
    MOCK_FLAGS_DEVICE_PASID = const(1 << 2, since="6.15")

with CONSTANTS.enum(since="6.8"):
    MOCK_NESTED_DOMAIN_IOTLB_ID_MAX = 3
    MOCK_NESTED_DOMAIN_IOTLB_NUM = 4

with CONSTANTS.enum(since="6.13"):
    MOCK_DEV_CACHE_ID_MAX = 3
    MOCK_DEV_CACHE_NUM = 4

with CONSTANTS.defines(since="6.15"):
    IOMMU_TEST_PASID_RESERVED = 1024


@cstruct()
class _add_reserved(Struct):
    start: aligned_u64
    length: aligned_u64


@cstruct()
class _mock_domain(Struct):
    out_stdev_id: u32
    out_hwpt_id: u32
    out_idev_id: u32


@cstruct()
class _mock_domain_flags(Struct):
    out_stdev_id: u32
    out_hwpt_id: u32
    out_idev_id: u32
    dev_flags: u32


@cstruct()
class _mock_domain_replace(Struct):
    pt_id: u32


@cstruct()
class _check_map(Struct):
    iova: aligned_u64
    length: aligned_u64
    uptr: aligned_u64


@cstruct()
class _check_refs(Struct):
    length: aligned_u64
    uptr: aligned_u64
    refs: u32


@cstruct()
class _create_access(Struct):
    out_access_fd: u32
    flags: u32


@cstruct()
class _destroy_access_pages(Struct):
    access_pages_id: u32


@cstruct()
class _access_pages(Struct):
    flags: u32
    out_access_pages_id: u32
    iova: aligned_u64
    length: aligned_u64
    uptr: aligned_u64


@cstruct()
class _access_rw(Struct):
    iova: aligned_u64
    length: aligned_u64
    uptr: aligned_u64
    flags: u32


@cstruct()
class _memory_limit(Struct):
    limit: u32


@cstruct()
class _access_replace_ioas(Struct):
    ioas_id: u32


@cstruct()
class _dirty(Struct):
    flags: u32
    iova: aligned_u64
    length: aligned_u64
    page_size: aligned_u64
    uptr: aligned_u64
    out_nr_dirty: aligned_u64


@cstruct()
class _check_iotlb(Struct):
    id: u32
    iotlb: u32


@cstruct()
class _trigger_iopf(Struct):
    dev_id: u32
    pasid: u32
    grpid: u32
    perm: u32
    addr: u64


@cstruct()
class _check_dev_cache(Struct):
    id: u32
    cache: u32


@cstruct()
class _trigger_vevent(Struct):
    dev_id: u32


@cstruct()
class _pasid_attach(Struct):
    pasid: u32
    pt_id: u32


@cstruct()
class _pasid_replace(Struct):
    pasid: u32
    pt_id: u32


@cstruct()
class _pasid_detach(Struct):
    pasid: u32


@cstruct()
class _pasid_check(Struct):
    pasid: u32
    hwpt_id: u32


@cstruct()
class _dmabuf_get(Struct):
    length: u32
    open_flags: u32


@cstruct()
class _dmabuf_revoke(Struct):
    dmabuf_fd: s32
    revoked: u32


@cstruct()
class _test_choice(Union):
    add_reserved: _add_reserved
    mock_domain: _mock_domain
    mock_domain_flags: _mock_domain_flags
    mock_domain_replace: _mock_domain_replace
    check_map: _check_map
    check_refs: _check_refs
    create_access: _create_access
    destroy_access_pages: _destroy_access_pages
    access_pages: _access_pages
    access_rw: _access_rw
    memory_limit: _memory_limit
    access_replace_ioas: _access_replace_ioas
    dirty: _dirty
    check_iotlb: _check_iotlb
    trigger_iopf: _trigger_iopf
    check_dev_cache: _check_dev_cache
    trigger_vevent: _trigger_vevent
    pasid_attach: _pasid_attach
    pasid_replace: _pasid_replace
    pasid_detach: _pasid_detach
    pasid_check: _pasid_check
    dmabuf_get: _dmabuf_get
    dmabuf_revoke: _dmabuf_revoke


@cstruct(since="6.2")
class iommu_test_cmd(Struct):
    """One command to the mock driver: `op` says which member of the union counts, `id` the object."""

    size: u32
    op: u32
    id: u32
    __reserved: u32
    anon0: _test_choice = anonymous()
    last: u32


#: The member of the union that an operation uses.
TEST_OP_MEMBERS = {
    IOMMU_TEST_OP_ADD_RESERVED: "add_reserved",
    IOMMU_TEST_OP_MOCK_DOMAIN: "mock_domain",
    IOMMU_TEST_OP_MD_CHECK_MAP: "check_map",
    IOMMU_TEST_OP_MD_CHECK_REFS: "check_refs",
    IOMMU_TEST_OP_CREATE_ACCESS: "create_access",
    IOMMU_TEST_OP_DESTROY_ACCESS_PAGES: "destroy_access_pages",
    IOMMU_TEST_OP_ACCESS_PAGES: "access_pages",
    IOMMU_TEST_OP_ACCESS_RW: "access_rw",
    IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT: "memory_limit",
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: "mock_domain_replace",
    IOMMU_TEST_OP_ACCESS_REPLACE_IOAS: "access_replace_ioas",
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: "mock_domain_flags",
    IOMMU_TEST_OP_DIRTY: "dirty",
    IOMMU_TEST_OP_MD_CHECK_IOTLB: "check_iotlb",
    IOMMU_TEST_OP_TRIGGER_IOPF: "trigger_iopf",
    IOMMU_TEST_OP_DEV_CHECK_CACHE: "check_dev_cache",
    IOMMU_TEST_OP_TRIGGER_VEVENT: "trigger_vevent",
    IOMMU_TEST_OP_PASID_ATTACH: "pasid_attach",
    IOMMU_TEST_OP_PASID_REPLACE: "pasid_replace",
    IOMMU_TEST_OP_PASID_DETACH: "pasid_detach",
    IOMMU_TEST_OP_PASID_CHECK_HWPT: "pasid_check",
    IOMMU_TEST_OP_DMABUF_GET: "dmabuf_get",
    IOMMU_TEST_OP_DMABUF_REVOKE: "dmabuf_revoke",
}

IOMMU_TEST_CMD = Ioctl(
    "IOMMU_TEST_CMD", IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 32), iommu_test_cmd, last="last", since="6.2", area="selftest"
)

with CONSTANTS.defines(since="6.6"):
    MOCK_PASID_WIDTH = const(20, since="6.15")
    IOMMU_HW_INFO_TYPE_SELFTEST = 0xFEEDBEEF
    IOMMU_HW_INFO_SELFTEST_REGVAL = 0xDEADBEEF


@cstruct(since="6.6")
class iommu_test_hw_info(Struct):
    """What IOMMU_GET_HW_INFO returns for a mock device."""

    flags: u32
    test_reg: u32


with CONSTANTS.defines(since="6.7"):
    IOMMU_HWPT_DATA_SELFTEST = 0xDEAD
    IOMMU_TEST_IOTLB_DEFAULT = const(0xBADBEEF, since="6.8")
    IOMMU_TEST_DEV_CACHE_DEFAULT = const(0xBADDAD, since="6.13")


@cstruct(since="6.7")
class iommu_hwpt_selftest(Struct):
    """Data of IOMMU_HWPT_ALLOC for a nested mock domain."""

    iotlb: u32
    pagetable_type: u32 = since("6.19")


with CONSTANTS.defines(since="6.8"):
    IOMMU_HWPT_INVALIDATE_DATA_SELFTEST = 0xDEADBEEF
    IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID = 0xDADBEEF
    IOMMU_TEST_INVALIDATE_FLAG_ALL = 1 << 0


@cstruct(since="6.8")
class iommu_hwpt_invalidate_selftest(Struct):
    """An invalidation of a nested mock domain."""

    flags: u32
    iotlb_id: u32


with CONSTANTS.defines(since="6.13"):
    IOMMU_VIOMMU_TYPE_SELFTEST = 0xDEADBEEF


@cstruct(since="6.17")
class iommu_viommu_selftest(Struct):
    """Data of IOMMU_VIOMMU_ALLOC for the mock: a loopback, and a page to mmap."""

    in_data: u32
    out_data: u32
    out_mmap_offset: aligned_u64
    out_mmap_length: aligned_u64


with CONSTANTS.defines(since="6.13"):
    IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST = 0xDEADBEEF
    IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST_INVALID = 0xDADBEEF


@cstruct(since="6.13")
class iommu_viommu_invalidate_selftest(Struct):
    """An invalidation of a mock vIOMMU."""

    flags: u32
    vdev_id: u32
    cache_id: u32


with CONSTANTS.defines(since="6.15"):
    IOMMU_VEVENTQ_TYPE_SELFTEST = 0xBEEFBEEF


@cstruct(since="6.15")
class iommu_viommu_event_selftest(Struct):
    """An event of a mock vIOMMU."""

    virt_id: u32


with CONSTANTS.defines(since="6.17"):
    IOMMU_HW_QUEUE_TYPE_SELFTEST = 0xDEADBEEF
    IOMMU_TEST_HW_QUEUE_MAX = 2

"""Event queues of unmodified programs: poll(2) and select(2) are the host's own, and know what is queued."""

from __future__ import annotations

import pytest

from tests.shim.test_run import WHY_NOT, run_python

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no seccomp user notification here: {WHY_NOT}")

PROGRAM = """
import select
sys.path.insert(0, os.getcwd())
from conformance.mock import answer_faults, mock_replace, read_faults, reporting_device, trigger_iopf
from uapi.linux import LinuxBackend

kernel = LinuxBackend()
iommu = kernel.open("/dev/iommu")
ids, queue = reporting_device(kernel, iommu)

def look(what):
    print(what, bool(select.select([queue.fileno()], [], [], 0)[0]), flush=True)

look("empty")
trigger_iopf(iommu, ids.idev)
trigger_iopf(iommu, ids.idev)
look("two")
print([fault.cookie for fault in read_faults(queue, 1)], flush=True)
look("one")
try:
    queue.read_to(0, 40)
except OSError as error:
    print("errno", error.errno, flush=True)
child = os.fork()
if child == 0:
    look("child")
    print([fault.cookie for fault in read_faults(queue)], flush=True)
    os._exit(0)
os.waitpid(child, 0)
look("read by the child")
print(answer_faults(queue, 2, 9, 1), flush=True)
trigger_iopf(iommu, ids.idev)
look("more")
mock_replace(iommu, ids.stdev, ids.parent)
look("detached")
"""

PRINTED = """
empty False
two True
[1]
one True
errno 14
child True
[2]
read by the child False
8
more True
detached False
"""


def test_select_follows_the_queue_through_reads_a_fork_and_a_detach() -> None:
    done = run_python(PROGRAM, "--machine", "mock")
    assert (done.stderr, done.stdout) == ("", PRINTED.lstrip())

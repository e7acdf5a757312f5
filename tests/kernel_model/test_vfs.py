"""kernel_model/vfs.py: paths, links, modes."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from kernel_model.errors import KernelError
from kernel_model.file import FileDescription, SystemCall
from kernel_model.kernel import Kernel
from kernel_model.process import CAP_DAC_OVERRIDE, Credentials, Mm, Process
from kernel_model.vfs import FileSystem


def caller(kernel: Kernel, uid: int = 0, capabilities: int = 0) -> SystemCall:
    return SystemCall(kernel, Process(1, Mm(1), False, Credentials(uid, capabilities)))


@pytest.fixture
def tree() -> FileSystem:
    tree = FileSystem()
    tree.add_file("/sys/a/b/read", lambda: b"text\n")
    tree.add_file("/sys/a/b/store", None, lambda call, data: None)
    tree.add_file("/sys/a/b/both", lambda: b"0123456789", lambda call, data: None)
    tree.add_link("/sys/relative", "a/b")
    tree.add_link("/sys/a/up", "../a/./b//")
    tree.add_link("/absolute", "/sys/relative")
    tree.add_link("/loop", "loop")
    tree.add_link("/dangling", "nowhere")
    tree.add_node("/dev/node", lambda call, flags: FileDescription(), 0o640)
    return tree


def refused(number: int) -> Any:
    return pytest.raises(KernelError, match=rf"\[Errno {number}\]")


@pytest.mark.parametrize(
    "path", ["/sys/a/b", "/sys/relative", "/absolute", "/sys/a/up", "/sys/a/../relative/.", "//sys//a/b"]
)
def test_every_way_to_a_directory_lists_it(tree: FileSystem, path: str) -> None:
    assert tree.listdir(path) == ["both", "read", "store"]


def test_dots_do_not_leave_the_root(tree: FileSystem) -> None:
    assert tree.listdir("/../../sys/a") == ["b", "up"]


def test_errnos_of_a_walk(tree: FileSystem) -> None:
    for path, number in [
        ("/nothing", errno.ENOENT),
        ("/dangling", errno.ENOENT),
        ("/loop", errno.ELOOP),
        ("/loop/more", errno.ELOOP),
        ("/dev/node", errno.ENOTDIR),
        ("/dev/node/more", errno.ENOTDIR),
        ("/dev/node/..", errno.ENOTDIR),
    ]:
        with refused(number):
            tree.listdir(path)
    assert not tree.exists("/dangling")


def test_readlink_is_for_the_last_link_alone(tree: FileSystem) -> None:
    assert tree.readlink("/absolute") == "/sys/relative"
    assert tree.readlink("/loop") == "loop"
    with refused(errno.EINVAL):
        tree.readlink("/absolute/read")


def test_removed_directory_is_gone_with_what_it_held(tree: FileSystem) -> None:
    tree.remove("/sys/a/b")
    tree.remove("/sys/a/b")
    with refused(errno.ENOENT):
        tree.listdir("/sys/relative")


def test_node_is_opened_by_its_mode(kernel: Kernel, tree: FileSystem) -> None:
    tree.open(caller(kernel), "/dev/node", os.O_RDWR)
    tree.open(caller(kernel, 1000, 1 << CAP_DAC_OVERRIDE), "/dev/node", os.O_RDWR)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        with refused(errno.EACCES):
            tree.open(caller(kernel, 1000), "/dev/node", flags)
    with refused(errno.EACCES):
        tree.open(caller(kernel, 1000), "/sys/a/b/both", os.O_RDWR)
    tree.open(caller(kernel, 1000), "/sys/a/b/both", os.O_RDONLY)
    with refused(errno.EISDIR):
        tree.open(caller(kernel), "/sys/a", os.O_RDONLY)


def test_attribute_is_not_opened_for_what_it_cannot_do_even_by_root(kernel: Kernel, tree: FileSystem) -> None:
    for name, flags in [("read", os.O_WRONLY), ("read", os.O_RDWR), ("store", os.O_RDONLY), ("store", os.O_RDWR)]:
        with refused(errno.EACCES):
            tree.open(caller(kernel), f"/sys/a/b/{name}", flags)


def test_attribute_is_read_from_a_position(kernel: Kernel, tree: FileSystem) -> None:
    file = tree.open(caller(kernel), "/sys/a/b/both", os.O_RDWR)
    call = caller(kernel)
    assert [file.read(call, 4, None), file.read(call, 100, None), file.read(call, 1, None)] == [b"0123", b"456789", b""]
    assert file.read(call, 3, 8) == b"89"
    assert file.read(call, 3, 1 << 60) == b""


def test_description_knows_how_it_was_opened(kernel: Kernel, tree: FileSystem) -> None:
    assert tree.open(caller(kernel), "/dev/node", os.O_WRONLY | os.O_CLOEXEC).access == os.O_WRONLY

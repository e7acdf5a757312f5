"""The paths a client sees: device nodes and sysfs.

A tree of directories, symbolic links and files. Subsystems add what they publish and remove it again; nothing here
knows what it is. Only what IOMMU and VFIO clients walk exists.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from kernel_model.errors import KernelError
from kernel_model.file import FileDescription, SystemCall
from kernel_model.process import CAP_DAC_OVERRIDE

#: Makes the open file for a node: called with the opening call and the open flags.
Opener = Callable[[SystemCall, int], FileDescription]
_LINKS = 40


class Directory(dict[str, "Node"]):
    """Names to nodes."""


class Link:
    """A symbolic link."""

    def __init__(self, target: str) -> None:
        self.target = target


class Special:
    """A device node, or a file. `mode` is its permission bits; it belongs to root."""

    def __init__(self, opener: Opener, mode: int) -> None:
        self.open = opener
        self.mode = mode

    def check_open(self, call: SystemCall, flags: int, path: str) -> None:
        """EACCES: the caller is not root, and the node's bits for others do not allow the access."""
        credentials = call.process.credentials
        if credentials.uid() == 0 or credentials.capable(CAP_DAC_OVERRIDE):
            return
        wanted = {os.O_RDONLY: 4, os.O_WRONLY: 2}.get(flags & os.O_ACCMODE, 6)
        if wanted & ~self.mode:
            raise KernelError(errno.EACCES, f"{path} has mode {self.mode:#o}")


Node = Directory | Link | Special


class SysfsFile(FileDescription):
    """An open sysfs attribute: `show` makes the text, `store` takes one write."""

    def __init__(
        self, path: str, show: Callable[[], bytes] | None, store: Callable[[SystemCall, bytes], None] | None
    ) -> None:
        self.path = path
        self._show = show
        self._store = store
        self._position = 0

    def read(self, call: SystemCall, count: int, offset: int | None) -> bytes:
        if self._show is None:
            raise KernelError(errno.EIO, f"{self.path} has no show()")
        start = self._position if offset is None else offset
        data = self._show()[start : start + count]
        if offset is None:
            self._position += len(data)
        return data

    def write(self, call: SystemCall, data: bytes | bytearray | memoryview, offset: int | None) -> int:
        if self._store is None:
            raise KernelError(errno.EIO, f"{self.path} has no store()")
        self._store(call, bytes(data))
        return len(data)


class FileSystem:
    """The tree."""

    def __init__(self) -> None:
        self.root = Directory()

    def add_node(self, path: str, opener: Opener, mode: int = 0o600) -> None:
        """A device node with its permission bits."""
        self._parent(path)[_name(path)] = Special(opener, mode)

    def add_file(
        self,
        path: str,
        show: Callable[[], bytes] | None,
        store: Callable[[SystemCall, bytes], None] | None = None,
        *,
        mode: int | None = None,
    ) -> None:
        """A sysfs attribute; `mode` where it is not what `show` and `store` say."""
        if mode is None:
            mode = (0o444 if show is not None else 0) | (0o200 if store is not None else 0)

        def open_attribute(call: SystemCall, flags: int) -> FileDescription:
            """kernfs_fop_open(): EACCES, root or not, for an access that the attribute does not have."""
            access = flags & os.O_ACCMODE
            if (show is None and access != os.O_WRONLY) or (store is None and access != os.O_RDONLY):
                raise KernelError(errno.EACCES, f"{path} has mode {mode:#o}")
            return SysfsFile(path, show, store)

        self.add_node(path, open_attribute, mode)

    def add_link_to(self, path: str, target: str) -> None:
        """A link to an absolute path, as sysfs makes it: up to what the link and the directory of the target share."""
        up = os.path.relpath(os.path.dirname(target), os.path.dirname(path))
        self.add_link(path, os.path.normpath(f"{up}/{os.path.basename(target)}"))

    def add_link(self, path: str, target: str) -> None:
        self._parent(path)[_name(path)] = Link(target)

    def add_directory(self, path: str) -> None:
        self._parent(path).setdefault(_name(path), Directory())

    def remove(self, path: str) -> None:
        """Take a node, a link or a whole directory away."""
        self._parent(path).pop(_name(path), None)

    def open(self, call: SystemCall, path: str, flags: int) -> FileDescription:
        node = self._walk(path)
        if isinstance(node, Directory):
            raise KernelError(errno.EISDIR, f"{path} is a directory")
        assert isinstance(node, Special)
        node.check_open(call, flags, path)
        description = node.open(call, flags)
        description.access = flags & os.O_ACCMODE
        return description

    def listdir(self, path: str) -> list[str]:
        node = self._walk(path)
        if not isinstance(node, Directory):
            raise KernelError(errno.ENOTDIR, f"{path} is not a directory")
        return sorted(node)

    def readlink(self, path: str) -> str:
        node = self._walk(path, follow_last=False)
        if not isinstance(node, Link):
            raise KernelError(errno.EINVAL, f"{path} is not a symbolic link")
        return node.target

    def exists(self, path: str) -> bool:
        try:
            self._walk(path)
        except KernelError:
            return False
        return True

    def _parent(self, path: str) -> Directory:
        node = self.root
        for part in _parts(path)[:-1]:
            child = node.setdefault(part, Directory())
            if not isinstance(child, Directory):
                raise KernelError(errno.ENOTDIR, path)
            node = child
        return node

    def _walk(self, path: str, follow_last: bool = True) -> Node:
        parts = _parts(path)
        stack: list[Directory] = [self.root]
        node: Node = self.root
        links = 0
        while parts:
            part = parts.pop(0)
            if part == "..":
                if len(stack) > 1:
                    stack.pop()
                node = stack[-1]
                continue
            here = stack[-1]
            if part not in here:
                raise KernelError(errno.ENOENT, path)
            node = here[part]
            if isinstance(node, Link) and (parts or follow_last):
                links += 1
                if links > _LINKS:
                    raise KernelError(errno.ELOOP, path)
                if node.target.startswith("/"):
                    stack = [self.root]
                parts = _parts(node.target) + parts
                node = stack[-1]
            elif isinstance(node, Directory):
                stack.append(node)
            elif parts:
                raise KernelError(errno.ENOTDIR, path)
        return node


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _name(path: str) -> str:
    return _parts(path)[-1]

"""Objects and their ids, after `struct iommufd_object` and main.c of drivers/iommu/iommufd.

An id is reserved when an object is made and becomes visible only by `finalize()`, after everything that can fail has
succeeded; until then `abort()` gives it back. Ids are the lowest free number from 1 and are reused. `users` starts at 1
(the table's own reference); DESTROY works only at 1.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, iommufd_should_fail, kmalloc

if TYPE_CHECKING:
    from kernel_model.iommufd.ctx import Context

MAX_ID = 0x7FFFFFFF


class Object:
    """Base of everything that has an id."""

    __slots__ = ("ctx", "id", "users")

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.users = 1
        if injecting:
            kmalloc(type(self).__name__)
        self.id = ctx.objects.reserve()

    def destroy(self) -> None:
        """Give back what the object holds. Never fails."""

    def abort_undo(self) -> None:
        """Undo a birth that failed; as `destroy` unless a class says otherwise."""
        self.destroy()


T = TypeVar("T", bound=Object)


class ObjectTable:
    """The id space of one context."""

    __slots__ = ("_free", "_lost", "_next", "_objects")

    def __init__(self) -> None:
        #: None marks a reserved id: an object being born, or a tombstone.
        self._objects: dict[int, Object | None] = {}
        self._free: list[int] = []
        self._next = 1
        #: Objects whose holder has gone without destroying them.
        self._lost = False

    def reserve(self) -> int:
        """The lowest free id. ENOSPC beyond 2^31-1."""
        if self._free:
            number = heapq.heappop(self._free)
        else:
            number = self._next
            if number > MAX_ID:
                raise KernelError(errno.ENOSPC, "no id is left")
            self._next += 1
        self._objects[number] = None
        return number

    def _release(self, number: int) -> None:
        del self._objects[number]
        heapq.heappush(self._free, number)

    def finalize(self, obj: Object) -> None:
        """Make the object visible: iommufd_object_finalize()."""
        if self._objects.get(obj.id, obj) is not None:
            raise KernelBug(f"id {obj.id} is finalized twice")
        self._objects[obj.id] = obj

    def abort(self, obj: Object) -> None:
        """Undo a birth: iommufd_object_abort_and_destroy()."""
        obj.abort_undo()
        if obj.users != 1 or self._objects.get(obj.id, obj) is not None:
            raise KernelBug(f"object {obj.id} is aborted with {obj.users} users")
        self._release(obj.id)

    def get(self, number: int, kind: type[T]) -> T:
        """iommufd_get_object(): the visible object of that kind. ENOENT otherwise."""
        if injecting:
            iommufd_should_fail(errno.ENOENT, "iommufd_get_object()")
        found = self._objects.get(number)
        if not isinstance(found, kind):
            raise KernelError(errno.ENOENT, f"{number} is not the id of {_article(kind)}")
        return found

    def remove(self, number: int) -> None:
        """IOMMU_DESTROY: ENOENT for no such id, EBUSY while anything else holds the object."""
        found = self._objects.get(number)
        if found is None:
            raise KernelError(errno.ENOENT, f"no object has the id {number}")
        if found.users != 1:
            raise KernelError(errno.EBUSY, f"object {number} has {found.users - 1} other users")
        self._erase(found)

    def _erase(self, obj: Object) -> None:
        self._release(obj.id)
        obj.ctx.forget(obj)
        obj.destroy()

    def destroy_user(self, obj: Object) -> None:
        """iommufd_object_destroy_user(): the kernel's own holder lets go and destroys the object."""
        obj.users -= 1
        if obj.users != 1:
            raise KernelBug(f"object {obj.id} is destroyed by its holder with {obj.users - 1} other users")
        self._erase(obj)

    def lose_user(self, obj: Object) -> None:
        """iommufd_object_destroy_user() of an object that others hold: the kernel warns, and it stays for ever."""
        obj.users -= 1
        self._lost = True

    def tombstone_user(self, obj: Object) -> None:
        """iommufd_object_tombstone_user(): as `destroy_user` for the only holder, but the id stays taken for ever."""
        if obj.users != 1:
            raise KernelBug(f"object {obj.id} becomes a tombstone with {obj.users - 1} other users")
        self._objects[obj.id] = None
        obj.destroy()

    def put_auto(self, obj: Object) -> None:
        """iommufd_object_put_and_try_destroy(): let go, and destroy the object if nobody else holds it."""
        obj.users -= 1
        if obj.users == 1:
            self._erase(obj)

    def release_all(self) -> None:
        """The last close: leaves first, by ascending id, pass after pass. What a lost object holds stays."""
        while True:
            live = [obj for _, obj in sorted(self._objects.items()) if obj is not None]
            if not live:
                return
            destroyed = 0
            for obj in live:
                # One that went with an earlier one is in the list, but no longer in the table.
                if obj.users == 1 and self._objects.get(obj.id) is obj:
                    self._erase(obj)
                    destroyed += 1
            if not destroyed:
                if self._lost:
                    return
                raise KernelBug(f"objects hold each other: {[(obj.id, obj.users) for obj in live]}")

    def each(self, kind: type[T]) -> Iterator[T]:
        """The visible objects of a kind by ascending id."""
        for _, obj in sorted(self._objects.items()):
            if isinstance(obj, kind):
                yield obj

    def __len__(self) -> int:
        """Ids in use, tombstones included."""
        return len(self._objects)


def _article(kind: type[Object]) -> str:
    name = "object" if kind is Object else kind.__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"

"""An ioctl as a typed callable.

Each ioctl is declared once, with its number, struct, last required member and first release. From that one line come
the model's dispatch table and size rules, the generated size tests, the trace's decoding and the documentation::

    IOMMU_IOAS_MAP = Ioctl("IOMMU_IOAS_MAP", IO(0x3B, 0x85), iommu_ioas_map, last="iova", since="6.2")

    reply = IOMMU_IOAS_MAP(file, ioas_id=2, user_va=address, length=4096, flags=...)
    print(reply.iova)
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from uapi.cstruct import OLDEST, Struct, offsetofend

if TYPE_CHECKING:
    from uapi.backend import Argument, File

S = TypeVar("S", bound=Struct)


class Ioctl(Generic[S]):
    """One ioctl of the ABI.

    `number` is the full 32-bit command. `struct` is what its argument points to (None: the argument is a plain value,
    described by `argument`). `last` names the last member that the kernel insists on: `min_size` ends there, and
    members after it were added later. `size_field` is the member that carries the size (`size` in iommufd, `argsz` in
    VFIO). `area` is the part of the project that the ioctl belongs to.
    """

    __slots__ = (
        "area",
        "argument",
        "backports",
        "last",
        "min_size",
        "name",
        "nr",
        "number",
        "since",
        "size",
        "size_field",
        "struct",
    )

    def __init__(
        self,
        name: str,
        number: int,
        struct: type[S] | None = None,
        *,
        last: str | None = None,
        argument: str = "none",
        since: str = OLDEST,
        backports: tuple[str, ...] = (),
        area: str = "",
    ) -> None:
        self.name = name
        self.number = number
        self.nr = number & 0xFF
        self.struct = struct
        self.argument = "struct" if struct is not None else argument
        self.last = last
        self.since = since
        self.backports = backports
        self.area = area
        self.size = ctypes.sizeof(struct) if struct is not None else 0
        self.min_size = offsetofend(struct, last) if struct is not None and last is not None else self.size
        names = [name for name, *_ in struct._fields_] if struct is not None else []
        self.size_field = names[0] if names and names[0] in ("size", "argsz") else None

    def make(self, **fields: Any) -> S:
        """The argument struct with its size member filled in."""
        if self.struct is None:
            raise TypeError(f"{self.name} takes no struct")
        if self.size_field is not None:
            fields.setdefault(self.size_field, self.size)
        return self.struct(**fields)

    def __call__(self, file: File, **fields: Any) -> S:
        """Make the argument from `fields`, issue the ioctl, return the struct as the kernel left it.

        Raises OSError with the kernel's errno.
        """
        arg = self.make(**fields)
        file.ioctl(self.number, arg)
        return arg

    def raw(self, file: File, arg: Argument = 0) -> int:
        """Issue the ioctl with an argument of the caller's own (a struct, a buffer, an address or a value)."""
        return file.ioctl(self.number, arg)

    def __repr__(self) -> str:
        return f"<Ioctl {self.name} {self.number:#x}>"

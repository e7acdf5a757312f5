"""What crosses the link between a function and the translation agent besides reads and writes.

Mirrors PCI Express Base chapter 10 (Address Translation Services): translation completions (10.2.3), invalidation
requests (10.3), page request and page request group response messages (10.4). Addresses are bytes, ranges are [start,
start + length), and a PASID of `NO_PASID` is a message without the prefix.

Left out: the messages' tags and ITags (a model's message is answered before anything else happens), partial
completions, translation requests for more than one range.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

#: Access bits of a request and of a translation. EXECUTE comes with READ; both it and PRIVILEGED are bits of the PASID
#: prefix, so only requests with a PASID have them.
READ, WRITE, EXECUTE, PRIVILEGED = 1, 2, 4, 8
#: The message carries no PASID.
NO_PASID = -1

#: Response codes of a page request group (10.4.2.1). A code that is none of them is handled as a failure.
PRG_SUCCESS, PRG_INVALID, PRG_FAILURE = 0b0000, 0b0001, 0b1111
#: Page request group indices have nine bits.
PRG_INDEX_MASK = 0x1FF


class Translation(NamedTuple):
    """A translation completion: the aligned power-of-two range [start, start + length) lies at `pa`.

    `allowed` are the READ, WRITE and EXECUTE that the function may do; none of them is the answer for a page that is
    not there. `untranslated` (U): the range may be accessed with untranslated requests only. `is_global`: the answer
    holds for every PASID.
    """

    start: int
    length: int
    pa: int
    allowed: int
    untranslated: bool = False
    is_global: bool = False


class Invalidation(NamedTuple):
    """An invalidation request: the function forgets translations of [start, start + length).

    `length` is a power of two of at least 4096 and `start` is aligned to it; 1 << 64 is everything. `pasid` limits it
    to one PASID's translations; NO_PASID, a request without the prefix, is for all of them, with and without a PASID;
    so is `every_pasid`, the global invalidate bit.
    """

    pasid: int
    start: int
    length: int
    every_pasid: bool = False


class PageRequest(NamedTuple):
    """A page request message: please make `address` (a page's start) accessible.

    `access` are READ (R), WRITE (W), and with a PASID EXECUTE and PRIVILEGED. `group` is the page request group index,
    `last` closes the group. Neither R nor W, with `last` and a PASID, is the stop marker.
    """

    rid: int
    pasid: int
    address: int
    access: int
    group: int
    last: bool

    @property
    def is_stop_marker(self) -> bool:
        return self.last and self.pasid != NO_PASID and not self.access & (READ | WRITE)


class PageResponse(NamedTuple):
    """A page request group response message; `pasid` is NO_PASID where the response carries none."""

    pasid: int
    group: int
    code: int


class AtsEndpoint(Protocol):
    """A function's side of these messages."""

    def invalidate(self, request: Invalidation, /) -> bool:
        """Forget what the request names; False if it is not completed."""

    def respond(self, response: PageResponse, /) -> bool:
        """Take a page request group response; False if the function has no page request interface."""


class Downstream(Protocol):
    """How a translation agent reaches the functions below it; the root complex is one."""

    def invalidate(self, rid: int, request: Invalidation, /) -> bool:
        """Carry an invalidation request to `rid`; False if it was not completed.

        Nobody is there, the function's ATS is off (Unsupported Request), or the function does not answer and the agent
        times out.
        """

    def respond(self, rid: int, response: PageResponse, /) -> bool:
        """Carry a page request group response to `rid`; False if nobody took it."""

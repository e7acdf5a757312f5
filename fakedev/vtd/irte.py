"""Entries of the interrupt remapping table, and the messages that name them.

Mirrors the VT-d specification 5.1.2 (messages of devices) and 9.9 (entries). The driver writes entries and messages
with the functions here; the unit takes them apart with the masks. Left out: entries for posted interrupts (9.10), which
no capability offers: their mode bit is reserved.
"""

from __future__ import annotations

ENTRY_BYTES = 16

# Lower word of an entry.
PRESENT, FPD, LOGICAL, REDIRECTION_HINT, LEVEL = (1 << bit for bit in range(5))
DELIVERY_SHIFT, DELIVERY_MASK = 5, 7
FIXED, LOWEST_PRIORITY, SMI, NMI, INIT, EXTINT = 0, 1, 2, 4, 5, 7
VECTOR_SHIFT, VECTOR_MASK = 16, 0xFF
DESTINATION_SHIFT = 32
#: Bits 14:12 and 31:24, and the mode bit of posted interrupts.
RESERVED_LOW = 7 << 12 | 1 << 15 | 0xFF << 24
#: Of the destination without extended interrupt mode: only bits 47:40 are an APIC's number.
RESERVED_DESTINATION = (0xFFFF << 48) | (0xFF << 32)

# Upper word: who may use the entry.
SID_MASK = 0xFFFF
SQ_SHIFT, SQ_MASK = 16, 3
SVT_SHIFT, SVT_MASK = 18, 3
RESERVED_HIGH = (1 << 64) - 1 & ~0xF_FFFF
#: Source validation: none, by SID and SQ, by the range of buses in SID (first, last).
SVT_NONE, SVT_SID, SVT_BUS = 0, 1, 2
#: The bits of a requester id that count, by SQ.
SQ_COMPARED = (0xFFFF, 0xFFFB, 0xFFF9, 0xFFF8)

# The address of a remappable message, and its data.
MESSAGE_ADDRESS = 0xFEE0_0000
HANDLE_SHIFT, HANDLE_MASK = 5, 0x7FFF
REMAPPABLE, SHV, HANDLE_15 = 1 << 4, 1 << 3, 1 << 2
SUBHANDLE_MASK = 0xFFFF

# The message that goes to the processors (Intel SDM volume 3, 12.11).
TO_DESTINATION_SHIFT, TO_REDIRECTION_HINT, TO_LOGICAL = 12, 1 << 3, 1 << 2
TO_DELIVERY_SHIFT, TO_ASSERT, TO_LEVEL = 8, 1 << 14, 1 << 15


def entry(
    vector: int,
    destination: int,
    sid: int,
    *,
    svt: int = SVT_SID,
    sq: int = 0,
    extended: bool = False,
    flags: int = REDIRECTION_HINT,
    delivery: int = FIXED,
) -> tuple[int, int]:
    """A present entry: its two words.

    `destination` is an APIC's number, of 8 bits unless the table is of `extended` interrupt mode. `flags`: FPD,
    LOGICAL, REDIRECTION_HINT, LEVEL.
    """
    low = vector << VECTOR_SHIFT | delivery << DELIVERY_SHIFT | flags | PRESENT
    return low | (destination if extended else destination << 8) << DESTINATION_SHIFT, (
        svt << SVT_SHIFT | sq << SQ_SHIFT | sid
    )


def message(index: int, subhandle: int | None = 0) -> tuple[int, int]:
    """The (address, data) of a message that names entry `index`, or `index + subhandle`; None: without a subhandle."""
    address = MESSAGE_ADDRESS | (index & HANDLE_MASK) << HANDLE_SHIFT | REMAPPABLE | (HANDLE_15 if index >> 15 else 0)
    return (address, 0) if subhandle is None else (address | SHV, subhandle)


def to_processor(low: int, extended: bool) -> tuple[int, int]:
    """The (address, data) that an entry sends on. A destination beyond 8 bits is above bit 40 of the address."""
    destination = low >> DESTINATION_SHIFT if extended else low >> 40 & 0xFF
    address = (destination & ~0xFF) << 32 | MESSAGE_ADDRESS | (destination & 0xFF) << TO_DESTINATION_SHIFT
    address |= (TO_REDIRECTION_HINT if low & REDIRECTION_HINT else 0) | (TO_LOGICAL if low & LOGICAL else 0)
    data = low >> VECTOR_SHIFT & VECTOR_MASK | (low >> DELIVERY_SHIFT & DELIVERY_MASK) << TO_DELIVERY_SHIFT | TO_ASSERT
    return address, data | (TO_LEVEL if low & LEVEL else 0)

"""`uapi diff`: the known history between the samples, and each rule of compatibility on small tables of its own."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from uapi import history
from uapi.diff import Change, Diff, DiffError, compare, load
from uapi.layout import Layout, Member
from uapi.table import ConstantFact, IoctlFact, StructFact, Table

H = "linux/vfio.h"


def table(structs=None, constants=None, ioctls=None, headers=(H,)) -> Table:
    made = Table("6.6", "x86_64", "a test", tuple(headers))
    made.structs = {name: StructFact(H, layout) for name, layout in (structs or {}).items()}
    made.constants = {name: ConstantFact(H, value, "enum", None) for name, value in (constants or {}).items()}
    made.ioctls = {name: IoctlFact(H, number) for name, number in (ioctls or {}).items()}
    return made


def struct(size: int, *members: tuple) -> Layout:
    """A layout out of (name, offset, size[, type])."""
    sizes = {1: "__u8", 2: "__u16", 4: "__u32", 8: "__u64"}
    made = tuple(Member(m[0], m[1], m[2], m[3] if len(m) > 3 else sizes[m[2]], None, ()) for m in members)
    return Layout(size, 4, made)


def diff_structs(old: Layout, new: Layout) -> Diff:
    return compare(table({"s": old}), table({"s": new}))


def one(diff: Diff, action: str, kind: str = "field") -> Change:
    (change,) = [change for change in diff.changes if (change.kind, change.action) == (kind, action)]
    return change


ARGSZ = ("argsz", 0, 4)


# --- the known history


def between(old: str, new: str, arch: str = "x86_64") -> dict[str, Change]:
    diff = compare(history.table(old, arch), history.table(new, arch))
    return {f"{change.action} {change.name}": change for change in diff.changes}


def test_the_stable_backport_is_told_with_its_origin() -> None:
    changes = between("6.12", "6.12.95")
    assert list(changes) == [
        "added iommu_hw_info.out_max_pasid_log2",
        "split iommu_hw_info.__reserved",
        "added iommu_hwpt_pgfault.__reserved",
        "added IOMMU_HW_CAP_PCI_PASID_EXEC",
        "added IOMMU_HW_CAP_PCI_PASID_PRIV",
    ]
    assert all(change.compatible for change in changes.values())
    words = changes["added IOMMU_HW_CAP_PCI_PASID_EXEC"].words
    assert words.endswith("new, 2 [mainline: since 6.15; stable: 6.12.95 took it over]")
    assert between("6.12.95", "6.12.107") == {}


def test_from_a_stable_release_to_a_later_mainline_one_the_backport_is_lost() -> None:
    changes = between("6.12.107", "6.13-rc7")
    assert not changes["removed IOMMU_HW_CAP_PCI_PASID_EXEC"].compatible
    assert not changes["removed iommu_hw_info.out_max_pasid_log2"].compatible
    assert "its bytes are __reserved now" in changes["removed iommu_hw_info.out_max_pasid_log2"].words
    assert changes["removed iommu_hwpt_pgfault.__reserved"].compatible


def test_the_count_of_ap_interrupts_grew_with_its_enum() -> None:
    change = between("6.14-rc3", "6.15-rc3")["changed VFIO_AP_NUM_IRQS"]
    assert change.words == (
        "VFIO_AP_NUM_IRQS: 1 -> 2; it counts the members of its enum, which gained VFIO_AP_CFG_CHG_IRQ_INDEX"
    )
    assert change.compatible


def test_the_nesting_extension_was_renamed_which_breaks_sources() -> None:
    change = between("6.12", "6.13-rc7")["removed VFIO_TYPE1_NESTING_IOMMU"]
    assert not change.compatible
    assert "its number is kept as __VFIO_RESERVED_TYPE1_NESTING_IOMMU" in change.words


def test_the_fault_record_moved_its_fields_on_i386_only() -> None:
    assert all(change.compatible for change in between("6.13-rc7", "6.13.4").values())
    changes = between("6.13-rc7", "6.13.4", "i386")
    assert not changes["resized iommu_hwpt_pgfault"].compatible
    assert changes["moved iommu_hwpt_pgfault.addr"].words == "iommu_hwpt_pgfault.addr: moved from byte 20 to 24"


def test_structs_with_their_size_first_grew_compatibly_in_every_step() -> None:
    mainline = [name for name in history.tables() if not name.startswith("6.12.")]
    for old, new in itertools.pairwise(mainline):
        broken = [name for name, change in between(old, new).items() if not change.compatible]
        assert broken == (["removed VFIO_TYPE1_NESTING_IOMMU"] if new == "6.13-rc7" else []), new


def test_the_first_header_of_iommufd_is_one_change() -> None:
    changes = between("6.1.187", "6.2")
    assert changes["added linux/iommufd.h"].words == "linux/iommufd.h: added, with 9 ioctls, 10 structs, 21 constants"
    assert not any("IOMMU_" in name for name in changes)


FACT = re.compile(r"- (added|changed|REMOVED|\+|~) (ioctl|struct|field|const) `([^`]+)`")
ACTIONS = {"added": "added", "+": "added", "changed": "changed", "~": "changed", "REMOVED": "removed"}
CHANGED = {"resized", "realigned", "split", "moved", "retyped", "renumbered", "changed"}


def test_the_whole_written_history_is_told() -> None:
    path = Path(__file__).parents[3] / "shared" / "uapi-facts" / "HISTORY.md"
    if not path.is_file():
        pytest.skip("HISTORY.md, the history that another tool wrote from the same samples, is not here")
    steps = re.split(r"^### ", path.read_text().partition("## i386")[0], flags=re.MULTILINE)[1:]
    assert len(steps) > 25
    for step in steps:
        title = re.match(r"(\S+) -> ([^\s:]+)", step)
        old, new = title[1].removesuffix("-vfio-only"), title[2]
        written = {(ACTIONS[action], kind, name) for action, kind, name in FACT.findall(step) if "<anon" not in name}
        told = {
            ("changed" if change.action in CHANGED else change.action, kind, change.name)
            for change in compare(history.table(old), history.table(new)).changes
            if (kind := change.kind.replace("constant", "const")) != "header"
        }
        assert told == written, f"{old} -> {new}"


# --- the rules


def test_equal_tables_have_no_change() -> None:
    diff = compare(history.table("6.16-rc3"), history.table("6.15-rc3"))
    assert diff.changes == ()
    assert diff.compatible


def test_what_one_direction_adds_the_other_removes() -> None:
    tables = list(history.tables().values())
    for old, new in itertools.combinations(tables, 2):
        forth, back = compare(old, new), compare(new, old)
        assert {(c.kind, c.name) for c in forth.changes if c.action == "added"} == {
            (c.kind, c.name) for c in back.changes if c.action == "removed"
        }, (old.release, new.release)


@pytest.mark.parametrize("first", ["size", "argsz"])
def test_a_struct_with_its_size_first_may_grow_at_its_end(first: str) -> None:
    diff = diff_structs(struct(8, (first, 0, 4), ("a", 4, 4)), struct(12, (first, 0, 4), ("a", 4, 4), ("b", 8, 4)))
    assert diff.compatible
    assert f"its first member `{first}` tells" in one(diff, "resized", "struct").words
    assert one(diff, "added").words == "s.b: new, __u32 at byte 8, at the end"


def test_a_struct_without_its_size_first_may_not_grow() -> None:
    diff = diff_structs(struct(4, ("a", 0, 4)), struct(8, ("a", 0, 4), ("b", 4, 4)))
    assert not one(diff, "resized", "struct").compatible
    assert not one(diff, "added").compatible


def test_a_size_of_another_type_or_place_does_not_count() -> None:
    wide = diff_structs(struct(8, ("size", 0, 8)), struct(16, ("size", 0, 8), ("b", 8, 8)))
    later = diff_structs(struct(8, ("a", 0, 4), ("size", 4, 4)), struct(12, ("a", 0, 4), ("size", 4, 4), ("b", 8, 4)))
    assert not wide.compatible
    assert not later.compatible


def test_a_capability_may_grow_at_its_end() -> None:
    header = ("header", 0, 8, "struct vfio_info_cap_header")
    diff = diff_structs(struct(12, header, ("a", 8, 4)), struct(16, header, ("a", 8, 4), ("b", 12, 4)))
    assert diff.compatible
    assert "it carries its version" in one(diff, "resized", "struct").words


def test_no_struct_may_shrink() -> None:
    diff = diff_structs(struct(12, ARGSZ, ("a", 4, 4), ("b", 8, 4)), struct(8, ARGSZ, ("a", 4, 4)))
    assert "it may not shrink" in one(diff, "resized", "struct").words
    assert not one(diff, "removed").compatible


def test_a_field_that_moved_is_incompatible_even_in_a_growing_struct() -> None:
    diff = diff_structs(struct(8, ARGSZ, ("a", 4, 4)), struct(12, ARGSZ, ("b", 4, 4), ("a", 8, 4)))
    assert not one(diff, "moved").compatible
    assert one(diff, "added").words == "s.b: new, __u32 at byte 4, over the bytes of a"
    assert not one(diff, "added").compatible


def test_a_field_that_shrank_or_changed_its_type_is_incompatible() -> None:
    shrunk = diff_structs(struct(8, ARGSZ, ("a", 4, 4)), struct(8, ARGSZ, ("a", 4, 2)))
    signed = diff_structs(struct(8, ARGSZ, ("a", 4, 4)), struct(8, ARGSZ, ("a", 4, 4, "__s32")))
    assert not one(shrunk, "resized").compatible
    assert not one(signed, "retyped").compatible


def test_reserved_bytes_may_be_split_into_fields() -> None:
    diff = diff_structs(
        struct(8, ARGSZ, ("__reserved", 4, 4)),
        struct(8, ARGSZ, ("a", 4, 1), ("__reserved", 5, 3, "__u8[3]")),
    )
    assert diff.compatible
    assert one(diff, "added").words == "s.a: new, __u8 at byte 4, out of __reserved"
    assert one(diff, "split").words == "s.__reserved: 4 reserved bytes at 4 -> 3 at 5"


def test_reserved_bytes_may_be_used_up() -> None:
    diff = diff_structs(struct(8, ARGSZ, ("pad", 4, 4)), struct(8, ARGSZ, ("a", 4, 2), ("b", 6, 2)))
    assert diff.compatible
    assert one(diff, "removed").words == "s.pad: its reserved bytes are a, b now"


def test_a_named_field_may_not_be_split() -> None:
    diff = diff_structs(struct(8, ARGSZ, ("flags", 4, 4)), struct(8, ARGSZ, ("a", 4, 2), ("b", 6, 2)))
    assert not diff.compatible
    assert one(diff, "removed").words == "s.flags: gone; its bytes are a, b now"


def test_padding_may_be_declared() -> None:
    diff = diff_structs(struct(16, ARGSZ, ("a", 8, 8)), struct(16, ARGSZ, ("b", 4, 4), ("a", 8, 8)))
    assert diff.compatible
    assert one(diff, "added").words == "s.b: new, __u32 at byte 4, where padding was"


def test_a_field_may_become_part_of_a_union() -> None:
    old = struct(8, ARGSZ, ("a", 4, 4))
    union = Member(
        None,
        4,
        4,
        "union <anonymous>",
        None,
        (Member("a", 4, 4, "__u32", None, ()), Member("b", 4, 4, "__u32", None, ())),
    )
    diff = diff_structs(old, Layout(8, 4, (old.members[0], union)))
    assert [change.words for change in diff.changes] == ["s.b: new, __u32 at byte 4, sharing its bytes with a"]
    assert diff.compatible


def test_members_of_an_unnamed_struct_are_compared_by_their_path() -> None:
    def made(offset: int) -> Layout:
        inner = (Member("x", offset, 4, "__u32", None, ()),)
        return Layout(
            12, 4, (Member("op", 0, 4, "__u32", None, ()), Member("set", 4, 8, "struct <anonymous>", None, inner))
        )

    assert one(diff_structs(made(4), made(8)), "moved").name == "s.set.x"


def test_a_constant_may_come_but_not_go_or_change() -> None:
    diff = compare(table(constants={"A": 1, "B": 2}), table(constants={"B": 3, "C": 0xFFFF}))
    assert [(change.action, change.name, change.compatible) for change in diff.changes] == [
        ("changed", "B", False),
        ("added", "C", True),
        ("removed", "A", False),
    ]
    assert diff.changes[1].words == "C: new, 0xffff"


def test_a_count_that_changed_without_its_enum_is_incompatible() -> None:
    diff = compare(table(constants={"A_NUM_IRQS": 1}), table(constants={"A_NUM_IRQS": 2}))
    assert not diff.compatible
    assert not compare(table(constants={"A_NUM_IRQS": 2}), table(constants={"A_NUM_IRQS": 1})).compatible


def test_an_ioctl_may_come_but_not_go_or_change_its_number() -> None:
    diff = compare(table(ioctls={"A": 1, "B": 2}), table(ioctls={"B": 3, "C": 4}))
    assert [(change.action, change.name, change.compatible) for change in diff.changes] == [
        ("renumbered", "B", False),
        ("added", "C", True),
        ("removed", "A", False),
    ]


def test_a_removed_struct_or_header_is_incompatible() -> None:
    assert not compare(table({"s": struct(4, ARGSZ)}), table()).compatible
    diff = compare(table({"s": struct(4, ARGSZ)}), table(headers=()))
    assert [(change.kind, change.action) for change in diff.changes] == [("header", "removed")]
    assert not diff.compatible


def test_a_diff_as_json_is_complete() -> None:
    diff = compare(history.table("6.14-rc3"), history.table("6.15-rc3"))
    data = json.loads(json.dumps(diff.to_json()))
    assert data["compatible"] is True
    assert data["old"]["release"] == "6.14-rc3"
    assert len(data["changes"]) == len(diff.changes)
    (split,) = [change for change in data["changes"] if change["name"] == "iommu_hw_info.__reserved"]
    assert split["old"] == {"offset": 28, "size": 4, "type": "__u32"}
    assert split["new"] == {"offset": 29, "size": 3, "type": "__u8[3]"}


# --- what a side may be


def test_a_sampled_release_is_taken_from_the_history_and_another_cut_from_the_declarations() -> None:
    assert "Debian" in load("7.3.4").source
    assert load("7.1").source.endswith("this release was not sampled")


@pytest.mark.parametrize(
    ("side", "sentence"),
    [
        ("nonsense", r"'nonsense' is no kernel release: .*, or a directory of headers\.$"),
        ("5.10", r"5\.10 is not of a known release; known are 6\.1 to 7\.3\.$"),
        ("7.4", r"7\.4 is not of a known release"),
        ("./nowhere", r"nowhere is no directory of headers\.$"),
    ],
)
def test_a_bad_side_is_one_sentence(side: str, sentence: str) -> None:
    with pytest.raises(DiffError, match=sentence):
        load(side)


def test_tables_of_two_architectures_are_not_compared() -> None:
    with pytest.raises(DiffError, match="a table of x86_64 cannot be compared with one of i386"):
        compare(load("6.6"), load("6.6", "i386"))

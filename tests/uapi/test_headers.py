"""Reading header trees by the compiler: trees made for the test, and this host's own headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from uapi import headers
from uapi.headers import HeaderError, read_headers, release_of
from uapi.table import table_at
from uapi.version import NEWEST, parse

HEADER = """
#ifndef TINY
#define TINY
#include <linux/types.h>
#include <linux/ioctl.h>
#define VFIO_TYPE (';')
#define VFIO_TINY _IO(VFIO_TYPE, 100 + 3)
#define VFIO_TINY_STRING "tiny"
#define VFIO_TINY_NEGATIVE -1
#define VFIO_TINY_BIT (1 << 31)
#define VFIO_TINY_HIGH 0xdeadbeef
#define VFIO_TINY_OF(x) ((x) + 1)
#define VFIO_TINY_NAME struct vfio_tiny
enum vfio_tiny_state { VFIO_TINY_STOP, VFIO_TINY_RUN = 5, };
struct vfio_tiny {
    __u32 argsz;
    union { __u16 one; struct { __u8 two, three; }; };
    struct { __u32 x; } named;
    __aligned_u64 big;
    __u64 *where;
    __u8 grid[2][3];
    struct vfio_tiny_row { __u64 a; } rows[];
};
#endif
"""


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    try:
        headers.compiler()
    except HeaderError as error:
        pytest.skip(str(error))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "usr/include/linux").mkdir(parents=True)
    (tmp_path / "usr/include/linux/vfio.h").write_text(HEADER)
    return tmp_path


def test_every_kind_of_declaration_is_read(tree: Path) -> None:
    table = read_headers(tree)
    assert table.headers == ("linux/vfio.h",)
    assert {name: fact.number for name, fact in table.ioctls.items()} == {"VFIO_TINY": 0x3B67}
    assert {name: fact.value for name, fact in table.constants.items()} == {
        "VFIO_TYPE": ord(";"),
        "VFIO_TINY_NEGATIVE": -1,
        "VFIO_TINY_BIT": -(1 << 31),
        "VFIO_TINY_HIGH": 0xDEADBEEF,
        "VFIO_TINY_STOP": 0,
        "VFIO_TINY_RUN": 5,
    }
    assert table.constants["VFIO_TINY_RUN"].enum == "vfio_tiny_state"
    assert list(table.structs) == ["vfio_tiny", "vfio_tiny_row"]  # C knows no scope of a struct
    layout = table.structs["vfio_tiny"].layout
    assert (layout.size, layout.align) == (40, 8)
    assert [(m.name, m.offset, m.size, m.text) for m in layout.members] == [
        ("argsz", 0, 4, "__u32"),
        (None, 4, 2, "union <anonymous>"),
        ("named", 8, 4, "struct <anonymous>"),
        ("big", 16, 8, "__u64"),
        ("where", 24, 8, "__u64 *"),
        ("grid", 32, 6, "__u8[2][3]"),
        ("rows", 40, 0, "struct vfio_tiny_row[]"),
    ]
    assert [layout.flat()[name].offset for name in ("one", "two", "three")] == [4, 4, 5]
    assert layout.flat()["big"].align == 8


def test_a_tree_is_found_in_its_usual_places(tmp_path: Path) -> None:
    for place in ("include/uapi", "usr/include", "include", ""):
        root = tmp_path / f"tree-{place.replace('/', '-')}"
        (root / place / "linux").mkdir(parents=True)
        (root / place / "linux/vfio.h").write_text(HEADER)
        assert headers.include_root(root) == (root / place).resolve()


def test_release_of_a_source_and_of_installed_headers(tree: Path) -> None:
    assert release_of(tree) is None
    (tree / "usr/include/linux/version.h").write_text(
        "#define LINUX_VERSION_MAJOR 6\n#define LINUX_VERSION_PATCHLEVEL 12\n#define LINUX_VERSION_SUBLEVEL 95\n"
    )
    assert release_of(tree) == "6.12.95"
    (tree / "Makefile").write_text("VERSION = 6\nPATCHLEVEL = 13\nSUBLEVEL = 0\nEXTRAVERSION = -rc7\n")
    assert release_of(tree) == "6.13-rc7"


def test_no_tree_no_header_and_a_broken_header_are_one_sentence_each(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="is no directory of headers"):
        read_headers(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HeaderError, match=r"has neither linux/iommufd\.h nor linux/vfio\.h"):
        read_headers(tmp_path / "empty")
    (tree / "usr/include/linux/vfio.h").write_text("struct half {")
    with pytest.raises(HeaderError, match=r"the headers do not compile \(.*error:"):
        read_headers(tree)
    (tree / "usr/include/linux/vfio.h").write_text("#include <not/there.h>\n")
    with pytest.raises(HeaderError, match=r"the headers do not preprocess \(.*not/there\.h"):
        read_headers(tree)


def test_a_missing_compiler_or_pyelftools_says_what_to_install(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("uapi.headers.find_spec", lambda name: None)
        with pytest.raises(HeaderError, match=r"needs pyelftools: pip install 'iommulab\[headers\]'"):
            read_headers(tree)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(HeaderError, match="needs a C compiler: install gcc"):
        read_headers(tree)


@pytest.mark.parametrize("arch", ["x86_64", "i386"])
def test_this_hosts_headers_equal_the_declarations_at_their_release(arch: str) -> None:
    """Each symbol is as declared for the headers' own release, or as in the later one that its tree took over."""
    root = Path("/usr/include")
    if not any((root / header).is_file() for header in headers.HEADERS[:2]):
        pytest.skip("this host has neither linux/iommufd.h nor linux/vfio.h: install linux-libc-dev")
    try:
        theirs = read_headers(root, arch)
    except HeaderError as error:
        if arch == "i386":
            pytest.skip(f"this host's compiler does not build 32-bit code: {error}")
        raise
    release = release_of(root)
    if release is None or parse(release).series > parse(NEWEST).series:
        pytest.skip(f"these headers are newer than {NEWEST}: {release}")
    then, now = table_at(release, arch), table_at(NEWEST, arch)
    for part in ("ioctls", "structs", "constants"):
        found, old, new = getattr(theirs, part), getattr(then, part), getattr(now, part)
        missing = {name for name, fact in old.items() if fact.header in theirs.headers} - found.keys()
        assert missing == set()
        wrong = {name: fact for name, fact in found.items() if fact not in (old.get(name), new.get(name))}
        assert wrong == {}

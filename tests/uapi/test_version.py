"""Release names, their order within a line of development, and membership across stable trees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uapi.cstruct import OLDEST
from uapi.profile import profile
from uapi.version import includes, parse

series = st.tuples(st.integers(2, 9), st.integers(0, 30))
mainline = series.map(lambda s: f"{s[0]}.{s[1]}")
candidates = st.tuples(series, st.integers(1, 9)).map(lambda t: f"{t[0][0]}.{t[0][1]}-rc{t[1]}")
points = st.tuples(series, st.integers(1, 400)).map(lambda t: f"{t[0][0]}.{t[0][1]}.{t[1]}")
names = st.one_of(mainline, candidates, points)


@given(names)
def test_a_release_includes_itself(name: str) -> None:
    assert includes(name, name)


@given(names, names)
def test_of_two_releases_in_one_series_the_later_includes_the_earlier(a: str, b: str) -> None:
    early, late = sorted((a, b), key=parse)
    if parse(early).series == parse(late).series:
        assert includes(late, early)


@given(names, mainline)
def test_a_mainline_thing_is_in_every_release_of_its_series_and_later(release: str, since: str) -> None:
    if since != OLDEST:
        assert includes(release, since) == (parse(release).series >= parse(since).series)


@given(names, mainline, points)
def test_a_backport_adds_only_later_points_of_its_own_series(release: str, since: str, backport: str) -> None:
    gained = includes(release, since, (backport,)) and not includes(release, since)
    own = parse(release).series == parse(backport).series
    assert not gained or (own and parse(release).point >= parse(backport).point)


@given(names, names)
def test_two_names_of_one_release_are_equal(a: str, b: str) -> None:
    assert (parse(a) == parse(b)) == (a == b)


def test_a_version_number_is_no_total_order() -> None:
    since, backports = "6.15", ("6.12.95",)
    assert [
        release for release in ("6.12", "6.12.94", "6.12.95", "6.12.107") if includes(release, since, backports)
    ] == [
        "6.12.95",
        "6.12.107",
    ]
    assert not includes("6.13-rc7", since, backports)
    assert not includes("6.14.9", since, backports)
    assert includes("6.15-rc1", since, backports)


def test_point_zero_is_the_release_itself() -> None:
    assert parse("6.19.0") == parse("6.19")


def test_a_point_release_in_since_counts_from_there_and_in_every_later_series() -> None:
    assert not includes("6.13-rc7", "6.13.4")
    assert not includes("6.13.3", "6.13.4")
    assert includes("6.13.4", "6.13.4")
    assert includes("6.14-rc1", "6.13.4")


@pytest.mark.parametrize("name", ["", "6", "v6.1", "6.1.2.3", "6.1-rc", "6.1.2-rc3", "six.one", "6.1 "])
def test_a_malformed_name_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match="is no kernel release: expected a name like"):
        parse(name)


def test_a_profile_has_what_its_release_has() -> None:
    old, backported, new = profile("6.12"), profile("6.12.95"), profile("7.3")
    assert "IOMMU_IOAS_MAP_FILE" not in old.ioctls
    assert new.ioctls["IOMMU_HWPT_ALLOC"].min_size == 24
    assert new.ioctls["IOMMU_HWPT_ALLOC"].size == 48
    assert "IOMMU_HW_CAP_PCI_PASID_EXEC" not in old.constants
    assert backported.constants["IOMMU_HW_CAP_PCI_PASID_EXEC"] == 2
    assert "IOMMU_HW_CAP_PCI_PASID_EXEC" not in profile("6.14").constants
    assert old.constants["VFIO_AP_NUM_IRQS"] == 1
    assert new.constants["VFIO_AP_NUM_IRQS"] == 2


def test_a_profiles_mask_leaves_out_unknown_flags() -> None:
    flags = ("IOMMU_HWPT_ALLOC_NEST_PARENT", "IOMMU_HWPT_ALLOC_DIRTY_TRACKING", "IOMMU_HWPT_FAULT_ID_VALID")
    assert profile("6.7").mask(*flags) == 3
    assert profile("6.11").mask(*flags) == 7
    assert profile("6.6").mask(*flags) == 0

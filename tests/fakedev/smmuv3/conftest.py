"""The bench of these tests: everything the unit can do, and nothing mapped."""

import pytest

from tests.fakedev.smmuv3.bench import Bench


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.close()

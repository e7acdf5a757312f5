"""The rig of these tests."""

import pytest

from tests.fakedev.vtd.rig import Rig


@pytest.fixture
def rig():
    """Makes rigs, and takes them down."""
    made = []

    def make(*args, **kwargs):
        made.append(Rig(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()

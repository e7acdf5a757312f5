"""kernel_model/iommufd/object.py: ids, two-phase birth, users, destruction."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommufd.object import MAX_ID, Object, ObjectTable


class Context:
    """As much of a context as objects see."""

    def __init__(self) -> None:
        self.objects = ObjectTable()
        self.log: list[tuple[str, int]] = []

    def forget(self, obj: Object) -> None:
        self.log.append(("forgotten", obj.id))


class Thing(Object):
    def __init__(self, ctx: Any, holds: list[Object] | None = None) -> None:
        super().__init__(ctx)
        self.holds = holds or []
        for held in self.holds:
            held.users += 1

    def destroy(self) -> None:
        for held in self.holds:
            held.users -= 1
        self.ctx.log.append(("destroyed", self.id))  # type: ignore[attr-defined]


class Other(Thing):
    pass


@pytest.fixture
def ctx() -> Context:
    return Context()


def born(ctx: Context, kind: type[Thing] = Thing, holds: list[Object] | None = None) -> Thing:
    made = kind(ctx, holds)
    ctx.objects.finalize(made)
    return made


def refused(number: int) -> Any:
    return pytest.raises(KernelError, match=rf"\[Errno {number}\]")


def test_ids_are_the_lowest_free_from_1(ctx: Context) -> None:
    assert [born(ctx).id for _ in range(4)] == [1, 2, 3, 4]
    ctx.objects.remove(3)
    ctx.objects.remove(1)
    assert [born(ctx).id for _ in range(3)] == [1, 3, 5]


def test_object_is_invisible_until_it_is_finalized(ctx: Context) -> None:
    made = Thing(ctx)
    with refused(errno.ENOENT):
        ctx.objects.get(made.id, Object)
    with refused(errno.ENOENT):
        ctx.objects.remove(made.id)
    assert list(ctx.objects.each(Object)) == []
    assert len(ctx.objects) == 1
    ctx.objects.finalize(made)
    assert ctx.objects.get(made.id, Thing) is made


def test_aborted_object_gives_its_id_back_and_undoes_itself(ctx: Context) -> None:
    made = Thing(ctx)
    ctx.objects.abort(made)
    assert ctx.log == [("destroyed", 1)]
    assert len(ctx.objects) == 0
    assert born(ctx).id == 1


def test_get_looks_at_the_kind(ctx: Context) -> None:
    made = born(ctx, Other)
    assert ctx.objects.get(made.id, Thing) is made
    with refused(errno.ENOENT):
        ctx.objects.get(born(ctx).id, Other)


def test_remove_of_a_held_object_is_ebusy(ctx: Context) -> None:
    inner = born(ctx)
    outer = born(ctx, holds=[inner])
    with refused(errno.EBUSY):
        ctx.objects.remove(inner.id)
    ctx.objects.remove(outer.id)
    ctx.objects.remove(inner.id)
    assert [entry for entry in ctx.log if entry[0] == "destroyed"] == [("destroyed", 2), ("destroyed", 1)]


def test_remove_tells_the_context_before_it_destroys(ctx: Context) -> None:
    born(ctx)
    ctx.objects.remove(1)
    assert ctx.log == [("forgotten", 1), ("destroyed", 1)]


def test_automatic_object_dies_with_its_last_holder(ctx: Context) -> None:
    made = born(ctx)
    made.users += 2
    ctx.objects.put_auto(made)
    assert len(ctx.objects) == 1
    ctx.objects.put_auto(made)
    assert len(ctx.objects) == 0


def test_holder_destroys_its_own_object(ctx: Context) -> None:
    made = born(ctx)
    made.users += 1
    ctx.objects.destroy_user(made)
    assert len(ctx.objects) == 0


def test_holder_that_is_not_alone_is_a_bug(ctx: Context) -> None:
    made = born(ctx)
    made.users += 2
    with pytest.raises(KernelBug):
        ctx.objects.destroy_user(made)


def test_last_close_destroys_holders_before_what_they_hold(ctx: Context) -> None:
    first = born(ctx)
    second = born(ctx, holds=[first])
    born(ctx, holds=[second, first])
    born(ctx)
    ctx.objects.release_all()
    assert [number for what, number in ctx.log if what == "destroyed"] == [3, 4, 2, 1]
    assert len(ctx.objects) == 0


def test_objects_that_hold_each_other_are_a_bug(ctx: Context) -> None:
    born(ctx).users += 1
    with pytest.raises(KernelBug):
        ctx.objects.release_all()


def test_finalizing_twice_is_a_bug(ctx: Context) -> None:
    made = born(ctx)
    with pytest.raises(KernelBug):
        ctx.objects.finalize(made)


def test_aborting_a_held_object_is_a_bug(ctx: Context) -> None:
    made = Thing(ctx)
    made.users += 1
    with pytest.raises(KernelBug):
        ctx.objects.abort(made)


def test_ids_end_at_31_bits(ctx: Context) -> None:
    ctx.objects._next = MAX_ID
    assert born(ctx).id == MAX_ID
    with refused(errno.ENOSPC):
        Object(SimpleNamespace(objects=ctx.objects))  # type: ignore[arg-type]


def test_each_goes_by_ascending_id(ctx: Context) -> None:
    for _ in range(3):
        born(ctx)
    ctx.objects.remove(1)
    born(ctx)
    assert [obj.id for obj in ctx.objects.each(Thing)] == [1, 2, 3]

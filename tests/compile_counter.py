"""Counts XLA compilations, those of eager operations included."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(eq=False)
class Count:
    """How many programs were compiled since `count_compiles` was entered, and which."""

    value: int = 0
    names: list[str] = dataclasses.field(default_factory=list)


_active: list[Count] = []


def _listen(event: str, _seconds: float, **more: object) -> None:
    if event == _EVENT:
        for count in _active:
            count.value += 1
            count.names.append(str(more.get("fun_name", "")))


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def count_compiles() -> Iterator[Count]:
    """`with count_compiles() as n: ...; assert n.value == 0`. Contexts may be nested.

    A test that takes JAX's listeners away would make every count 0: so each context first sees that it counts.
    """
    count = Count()
    _active.append(count)
    try:
        jax.monitoring.record_event_duration_secs(_EVENT, 0.0)
        assert count.value == 1, "JAX no longer tells of compilations"
        for each in _active:
            each.value -= 1
            each.names.pop()
        yield count
    finally:
        _active.remove(count)

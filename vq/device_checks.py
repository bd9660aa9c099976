"""What the author of a `vq.Device` can get wrong before the first chain comes, and what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from vq import virtio as v
from vq.config_layout import ConfigLayout
from vq.errors import UsageError
from vq.offer import QUEUES_MAX

__all__ = ["check_class", "check_methods", "check_object", "check_state", "feature_mask", "queue_names"]

OF_THE_CLASS: Final = ("Config", "features", "max_bytes", "packed", "queues")


def feature_mask(features: int | Iterable[int]) -> int:
    """The mask of what `Device.features` says."""
    try:
        mask = features if isinstance(features, int) else v.mask(*features)
    except (TypeError, ValueError):
        mask = -1
    if not 0 <= mask < 1 << 64:
        raise UsageError(f"features is {features!r}; write a mask, or the numbers of bits, which are 0 to 63")
    return mask


def queue_names(queues: int | Sequence[str]) -> list[str]:
    """The names of the queues that `Device.queues` says."""
    if isinstance(queues, int):
        count, names = queues, []
    elif isinstance(queues, list | tuple) and all(isinstance(name, str) for name in queues):
        count, names = len(queues), list(queues)
    else:  # one string as well, whose letters would be names
        raise UsageError(f"queues is {queues!r}; write how many a device has, or a tuple of their names")
    if not 1 <= count <= QUEUES_MAX:
        raise UsageError(f"a device has 1 to {QUEUES_MAX} queues, not {count}")
    if "" in names or len(set(names)) < len(names):
        raise UsageError(f"queues is {queues!r}; each needs a name of its own, which errors and counters say")
    return names or [f"queue{index}" for index in range(count)]


def check_class(max_bytes: Any, layout: Any) -> None:
    """Refuse values of `Device.max_bytes` and `Device.Config` that make no sense."""
    if not (isinstance(max_bytes, int) and 1 <= max_bytes < 1 << 63):
        raise UsageError(f"max_bytes is {max_bytes!r}; it must be a number of bytes from 1")
    if layout is not None and not (isinstance(layout, type) and issubclass(layout, ConfigLayout)):
        raise UsageError(f"Config is {layout!r}; it must be a class derived from vq.ConfigLayout")
    if layout is not None and not layout.SIZE:
        raise UsageError("Config has no field; one is annotated with its type, as in capacity: vq.le64 = 0")


def check_methods(device: object, names: Iterable[str]) -> None:
    """Refuse methods that are hidden, or called for nothing: the loop awaits no coroutine and runs no generator."""
    for name in names:
        method = getattr(device, name)
        where = f"{type(device).__name__}.{name}"
        if not callable(method):
            raise UsageError(f"{where} is {method!r}, which hides a method of vq.Device; take another name")
        if inspect.iscoroutinefunction(method):
            raise UsageError(f"{where} is a coroutine, which nobody awaits; write a plain method, which starts a task")
        if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
            raise UsageError(f"{where} is a generator, which nobody runs; write a method without yield")


def check_state(cls: type, base: type) -> None:
    """Refuse a state that is saved and cannot be loaded, or the other way round."""
    save, load = (getattr(cls, name) is not getattr(base, name) for name in ("save_state", "load_state"))
    if save != load:
        has, lacks = ("save_state", "load_state") if save else ("load_state", "save_state")
        raise UsageError(f"{cls.__name__} has {has} and no {lacks}; a state that moves needs both")


def check_object(device: object, made: Mapping[str, object]) -> None:
    """Refuse attributes that were assigned after what a class says had become an offer, queues and descriptors.

    Parameters
    ----------
    device
        A `vq.Device`.
    made
        What its base has put into the object, by name.
    """
    now = vars(device)
    for name in OF_THE_CLASS:
        if now.get(name) is not made.get(name):
            remedy = "it counts before __init__: write it in the class, or make a class that has another one"
            raise UsageError(f"{type(device).__name__}.{name} was assigned to the object; {remedy}")
    for name, value in made.items():
        if now.get(name) is not value:
            raise UsageError(f"{type(device).__name__}.{name} was assigned, which vq.Device needs; take another name")

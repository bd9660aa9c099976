"""What the author of a device gets wrong before any chain comes is refused, and the refusal says what to write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vq
from vq.testing import Guest

Serve = Callable[[vq.HostedDevice], str]
Connect = Callable[..., Guest]
pytest_plugins = ["vq.testing.plugin"]


class Echo(vq.Device):
    """Answers with what came, backwards, and has a configuration space."""

    class Config(vq.ConfigLayout):
        size: vq.le32 = 1

    def handle(self, queue: vq.DeviceQueue) -> None:
        for chain in queue:
            chain.write(chain.read()[::-1])
            chain.complete()


@pytest.mark.parametrize("queues", [0, -1, 257, ()])
def test_a_number_of_queues_that_cannot_be(queues: Any) -> None:
    count = queues if isinstance(queues, int) else len(queues)
    with pytest.raises(vq.UsageError, match=f"1 to 256 queues, not {count}$"):
        type("Odd", (vq.Device,), {"queues": queues})()


@pytest.mark.parametrize("features", ["RING", [-1], [64], -1, 1 << 64, None])
def test_features_that_cannot_be(features: Any) -> None:
    with pytest.raises(vq.UsageError, match="write a mask, or the numbers of bits"):
        type("Odd", (vq.Device,), {"features": features})()


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("queues", "rx", "tuple of their names"),
        ("queues", [1], "tuple of their names"),
        ("queues", 2.5, "tuple of their names"),
        ("queues", ("same", "same"), "a name of its own"),
        ("queues", ("",), "a name of its own"),
        ("max_bytes", 0, "a number of bytes"),
        ("max_bytes", "1M", "a number of bytes"),
        ("Config", dict, "derived from vq.ConfigLayout"),
        ("Config", 5, "derived from vq.ConfigLayout"),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_attribute_that_cannot_be_is_told_with_what_can(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(vq.UsageError, match=f"^{name} is .*{remedy}"):
        type("Odd", (vq.Device,), {name: value})()


def test_a_class_in_place_of_its_object_is_told(tmp_path: Path) -> None:
    with pytest.raises(vq.UsageError, match=r"give an object of it: Echo\(\)"):
        vq.serve(Echo, socket_path=str(tmp_path / "a.sock"))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [vq.Server, vq.Backend])
@pytest.mark.parametrize("device", [Echo, None, 5])
def test_what_is_no_device_is_told(make: Any, device: Any, tmp_path: Path) -> None:
    with pytest.raises(vq.UsageError, match="give an object of"):
        make(device, path=str(tmp_path / "a.sock"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"), [("queues", 2), ("queues", []), ("features", 1 << 5), ("packed", False), ("max_bytes", 64)]
)
def test_what_a_class_says_comes_too_late_in_an_object(vq_serve: Serve, name: str, value: Any) -> None:
    device = Echo()
    setattr(device, name, value)
    with pytest.raises(vq.UsageError, match=f"^Echo.{name} was assigned to the object; .* write it in the class"):
        vq_serve(device)


@pytest.mark.parametrize("name", ["chains", "_calls", "_closed", "requests_fd"])
def test_what_the_base_needs_is_not_taken_from_it(vq_serve: Serve, name: str) -> None:
    device = Echo()
    before = getattr(device, name)
    setattr(device, name, 5)
    with pytest.raises(vq.UsageError, match=f"^Echo.{name} was assigned, .* take another name"):
        vq_serve(device)
    setattr(device, name, before)


@pytest.mark.parametrize("name", ["start", "reset", "call", "handle", "on_stop", "settle"])
@pytest.mark.parametrize("where", ["class", "object"])
def test_no_method_is_hidden(vq_serve: Serve, where: str, name: str) -> None:
    device = type("Odd", (Echo,), {name: 5} if where == "class" else {})()
    if where == "object":
        setattr(device, name, 5)
    with pytest.raises(vq.UsageError, match=f"^Odd.{name} is 5, which hides a method"):
        vq_serve(device)


async def coroutine(self: vq.Device, queue: vq.DeviceQueue) -> None:
    await asyncio.sleep(0)


def generator(self: vq.Device, queue: vq.DeviceQueue) -> Iterator[vq.DeviceChain]:
    yield from queue


async def both(self: vq.Device, queue: vq.DeviceQueue) -> AsyncIterator[vq.DeviceChain]:
    for chain in queue:
        yield chain


@pytest.mark.parametrize(
    ("name", "method", "remedy"),
    [
        ("handle", coroutine, "a plain method, which starts a task"),
        ("on_stop", coroutine, "a plain method, which starts a task"),
        ("handle", generator, "a method without yield"),
        ("handle", both, "a method without yield"),
    ],
)
def test_a_method_that_would_do_nothing_is_told(vq_serve: Serve, name: str, method: Any, remedy: str) -> None:
    with pytest.raises(vq.UsageError, match=f"^Odd.{name} is a .*{remedy}"):
        vq_serve(type("Odd", (Echo,), {name: method})())


def test_a_device_without_a_handler_is_told(vq_serve: Serve) -> None:
    with pytest.raises(vq.UsageError, match=r"^Odd has no method handle\(self, queue\)"):
        vq_serve(type("Odd", (vq.Device,), {"handel": Echo.handle})())


def test_a_device_that_was_closed_is_not_served_again(tmp_path: Path) -> None:
    device = Echo()
    vq.serve(device, socket_path=tmp_path / "a.sock", duration=0)
    with pytest.raises(vq.UsageError, match=r"was closed.*make a new one"):
        vq.serve(device, socket_path=tmp_path / "a.sock", duration=0)


def test_a_configuration_space_can_be_made_anew(vq_guest: Connect) -> None:
    device = Echo()
    device.config = Echo.Config(size=2)
    guest = vq_guest(device)
    assert guest.config(4) == b"\2\0\0\0"
    device.config = Echo.Config(size=3)
    guest.wait_config_change()
    device.config.size = 4
    guest.wait_config_change()
    assert guest.config(4) == b"\4\0\0\0"


def test_a_configuration_space_is_of_its_class() -> None:
    device = Echo()
    with pytest.raises(vq.UsageError, match=r"^Echo.config is \{'size': 2\}; it must be an object of its class Config"):
        device.config = {"size": 2}
    bare = type("Bare", (vq.Device,), {})()
    with pytest.raises(AttributeError, match=r"Bare has no configuration space; give it a class Config"):
        bare.config.size = 2
    with pytest.raises(vq.UsageError, match=r"^Bare.config is 5; it must be none"):
        bare.config = 5


def test_a_layout_without_fields_is_told() -> None:
    class Config(vq.ConfigLayout):
        """Nothing, yet."""

    with pytest.raises(vq.UsageError, match=r"^Config has no field; one is annotated"):
        type("Odd", (vq.Device,), {"Config": Config})()


@pytest.mark.parametrize("make", [vq.Server, vq.Backend])
def test_paths_are_those_of_pathlib_too(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    device = Echo()
    with make(device, path=path):
        assert path.is_socket()
    with pytest.raises(vq.UsageError, match=r"either the path of a socket or an inherited descriptor \(fd\)"):
        make(Echo(), path=path, fd=3)
    device.close()


@pytest.mark.parametrize("name", ["save_state", "load_state"])
def test_half_a_state_is_told(vq_serve: Serve, name: str) -> None:
    with pytest.raises(vq.UsageError, match=rf"^Odd has {name} and no .*needs both"):
        vq_serve(type("Odd", (Echo,), {name: lambda self, *state: b""})())


@pytest.mark.parametrize("make", [vq.Server, vq.Backend])
def test_a_device_is_served_once_at_a_time(make: Any, tmp_path: Path) -> None:
    device = Echo()
    with vq.Backend(device, path=tmp_path / "a.sock"), pytest.raises(vq.UsageError, match="served by another back-end"):
        make(device, path=tmp_path / "b.sock")
    with vq.Backend(device, path=tmp_path / "b.sock"):
        pass
    device.close()


@pytest.mark.parametrize("mode", [660, -1, "660"])
def test_a_mode_is_octal(mode: Any, tmp_path: Path) -> None:
    with pytest.raises(vq.UsageError, match=f"^mode is {mode!r}; .*octal, such as 0o660"):
        vq.serve(Echo(), socket_path=tmp_path / "a.sock", mode=mode, duration=0)
    assert not any(tmp_path.iterdir())

"""Programs between ports: every verdict in every shape of a pump, every kind of program, and what a wrong one does."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi
import numpy as np
import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

import vq
import vq_core
from pump_rig import PACKED, USUAL, Background, Guest, port_counters, pumping, two_cpus
from vq import virtio as v
from vq.program import as_program, load_program
from vq_core.plan import Plan
from vq_core.ports.gen import GenPort
from vq_core.ports.null import NullPort
from vq_core.program import DROP, REFLECT

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = """
#include "vq_program.h"
static uint32_t seen;
uint32_t every_other(void *state, const vq_packet_t *packets, uint16_t *verdicts, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        verdicts[i] = seen++ % 2 ? VQ_VERDICT_DROP : VQ_VERDICT_PASS;
    return count;
}
uint32_t anywhere(void *state, const vq_packet_t *packets, uint16_t *verdicts, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        verdicts[i] = (uint16_t)(*(uint32_t *)state = *(uint32_t *)state * 1664525 + 1013904223) | 4;
    return 1;
}
uint32_t paint(void *state, const vq_packet_t *packets, uint16_t *verdicts, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        packets[i].data[packets[i].head_bytes - 1] = 0x5a;
    return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("program")
    source = folder / "program.c"
    source.write_text(SOURCE)
    include = Path(vq_core.__file__).parent / "include"
    command = ["gcc", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{include}", "-o", folder / "program.so", source]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "program.so"))


def run(ports: list[str], program: Any) -> dict[str, Any]:
    """Pump until the sources have ended; the counters of the ports."""
    with vq.Pump(ports, program=program) as pump:
        pump.run(duration=60)
        found: dict[str, Any] = pump.snapshot()["ports"]
    return found


def verdict(number: int) -> Callable[[vq.Burst], Any]:
    return lambda burst: np.full(burst.count, number)


def test_every_verdict_between_two_ports() -> None:
    ports = ["gen:count=1000,size=64", "null:"]
    for program, taken, dropped in (
        (None, 1000, 0),
        (lambda burst: None, 1000, 0),
        (verdict(0), 1000, 0),
        (verdict(DROP), 0, 1000),
        (verdict(2), 1000, 0),  # port 1
        (verdict(3), 0, 1000),  # there is no port 2
        (verdict(0x7000), 0, 1000),
    ):
        found = run(ports, program)
        assert found["null"]["to_null"]["packets"] == taken
        assert found["gen"]["from_gen"]["dropped"] == ({"program": dropped} if dropped else {})


def test_compiled_programs(library: ctypes.CDLL) -> None:
    program = vq.NativeProgram(library.every_other, abi=1)
    assert program.name == "every_other"
    found = run(["gen:count=1001,size=64", "null:"], program)
    assert found["null"]["to_null"]["packets"] == 501
    assert found["gen"]["from_gen"]["dropped"] == {"program": 500}


def test_a_program_of_cffi(library: ctypes.CDLL) -> None:
    """As somebody has it who knows functions of C by cffi: the function, or its address."""
    ffi = cffi.FFI()
    ffi.cdef("uint32_t every_other(void *, const void *, uint16_t *, uint32_t);")
    function = ffi.dlopen(library._name).every_other
    for given in (function, int(ffi.cast("uintptr_t", function))):
        program = vq.NativeProgram(given, abi=1, name="every other")
        found = run(["gen:count=1000,size=64", "null:"], program)
        assert found["null"]["to_null"]["packets"] == 500
    with pytest.raises(vq.UsageError, match="wrap compiled code"):
        as_program(function)


def test_a_state_that_is_no_address_is_told_how_to_get_it(library: ctypes.CDLL) -> None:
    with pytest.raises(TypeError, match=r"ctypes.addressof\(state\)"):
        vq.NativeProgram(library.anywhere, abi=1, state=ctypes.c_uint32(7))  # type: ignore[arg-type]


def test_addresses_without_code(library: ctypes.CDLL) -> None:
    data = ctypes.c_uint64(0)
    for given in (0, 1, 4096, -1, 1 << 70, ctypes.addressof(data)):
        with pytest.raises(ValueError, match="where no code lies"):
            vq.NativeProgram(given, abi=1)
    with pytest.raises(ValueError, match="must be an address"):
        vq.NativeProgram(True, abi=1)


def test_a_program_that_writes_anything_sends_nothing_astray(library: ctypes.CDLL) -> None:
    """Verdicts are numbers of ports at most; three ports, so that they go by the switch."""
    state = ctypes.c_uint32(7)
    program = vq.NativeProgram(library.anywhere, abi=1, state=ctypes.addressof(state))
    found = run(["gen:count=20000,size=64", "null:", "null:"], program)
    taken = [port["packets"] for name, both in found.items() for way, port in both.items() if way == f"to_{name}"]
    dropped = found["gen"]["from_gen"]["dropped"]["program"]
    assert sum(taken) + dropped >= 20000


def test_a_program_may_change_bytes_of_a_capture(library: ctypes.CDLL, tmp_path: Path) -> None:
    """What is replayed is ours to write; the file does not see it. In a process of its own, which it must not end."""
    before, after, module = tmp_path / "before.pcap", tmp_path / "after.pcap", tmp_path / "paint.py"
    run(["gen:count=50,size=64", f"pcap:{before},write"], None)
    original = before.read_bytes()
    module.write_text(f"import ctypes, vq\npaint = vq.NativeProgram(ctypes.CDLL({library._name!r}).paint, abi=1)\n")
    command = ["vq", "pump", f"pcap:{before}", f"pcap:{after},write", "--program", f"{module}:paint"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert before.read_bytes() == original
    frames = after.read_bytes()[24:]
    assert len(frames) == 50 * (16 + 64)
    assert {frames[end] for end in range(16 + 63, len(frames), 16 + 64)} == {0x5A}


def test_a_switch_has_the_last_word_on_what_passes() -> None:
    def third(burst: vq.Burst) -> Any:
        verdicts = burst.verdicts
        verdicts[::3] = DROP
        verdicts[1::3] = 3  # port 2
        return verdicts

    found = run(["gen:count=960,size=64", "null:", "null:"], third)
    nulls = [both for name, both in found.items() if name.startswith("null")]
    counts = [next(port["packets"] for way, port in both.items() if way.startswith("to_")) for both in nulls]
    assert found["gen"]["from_gen"]["dropped"]["program"] == 330
    assert counts == [300, 630]  # what passes is flooded to both


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_traffic_of_guests_through_a_program(tmp_path: Path, layout: str) -> None:
    """An echo whose program says so itself: everything comes back, and nothing twice."""
    path = str(tmp_path / "a.sock")
    features = USUAL | (PACKED if layout == "packed" else 0)
    with pumping(f"vhost:{path}", program=verdict(REFLECT)), Guest(path, features) as guest:
        background = Background(guest.streams(), patience=60)
        background.goes_on(2000)
        background.finish()


@pytest.mark.parametrize("layout", [0, PACKED], ids=["split", "packed"])
def test_what_comes_back_needs_no_target(tmp_path: Path, layout: int) -> None:
    """Each pair by its own rings, under two workers, while the guest it was going to comes, takes nothing, and dies."""
    here, there = (f"{tmp_path}/{name}.sock" for name in "ab")
    ports = f"vhost:{here},queues=2", f"vhost:{there},queues=2"
    features = USUAL | layout
    with pumping(*ports, cpus=two_cpus(), program=verdict(REFLECT)) as pump, Guest(here, features, pairs=2) as guest:
        background = Background(guest.streams(), patience=30)
        background.goes_on(200)
        for _ in range(3):
            with Guest(there, features, pairs=2):
                background.goes_on(100)
            background.goes_on(100)
        background.finish()
        assert port_counters(pump, 1)["to_guest"]["packets"] == 0


def test_what_comes_back_is_cut_for_a_guest_that_takes_no_long_packets(tmp_path: Path) -> None:
    payload = bytes(i * 7 & 255 for i in range(2500))
    ends = IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=1, dport=2, seq=1000, chksum=0)
    packet = bytes(Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01") / ends / payload)
    header = struct.pack("<BBHHHH", 1, 1, 54, 1000, 34, 16) + bytes(2)
    sends = USUAL | v.mask(v.VIRTIO_NET_F_CSUM, v.VIRTIO_NET_F_HOST_TSO4)
    with (
        pumping(f"vhost:{tmp_path}/a.sock", f"vhost:{tmp_path}/b.sock", program=verdict(REFLECT)),
        Guest(f"{tmp_path}/a.sock", sends) as guest,
    ):
        guest.post(1514, 4)
        guest.send(packet, header)
        got = [guest.receive() for _ in range(3)]
    assert [header for header, _ in got] == [bytes(10) + b"\1\0"] * 3
    assert b"".join(segment[54:] for _, segment in got) == payload
    assert [Ether(segment)[TCP].seq for _, segment in got] == [1000, 2000, 3000]


def test_heads_are_what_was_sent() -> None:
    seen: list[tuple[Any, Any]] = []

    def look(burst: vq.Burst) -> None:
        seen.append((burst.lengths.copy(), burst.heads(100).copy()))
        assert len(burst) == burst.count == len(burst.heads(1)) <= 32

    run(["gen:count=50,size=64", "null:"], look)
    assert sum(len(lengths) for lengths, _ in seen) == 50
    for lengths, heads in seen:
        assert set(lengths) == {64}
        assert heads.shape[1] == 100
        assert not heads[:, 64:].any()
        assert (heads[:, 12:14] == (8, 0)).all()


def test_fields_and_bytes_of_packets() -> None:
    kept: list[Any] = []

    def look(burst: vq.Burst) -> None:
        heads = burst.heads(60)
        assert (burst.field(12, ">u2") == 0x0800).all()
        assert (burst.field(6, "V6").view(np.uint8).reshape(-1, 6) == heads[:, 6:12]).all()
        assert not burst.field(59, ">u2").any()  # half a field is none
        data, offsets = burst.gather()
        assert (data.reshape(-1, 60) == heads).all()
        assert offsets.tolist() == list(range(0, 60 * burst.count + 1, 60))
        some, offsets = burst.gather(np.arange(burst.count) % 2 == 1)
        assert (some.reshape(-1, 60) == heads[1::2]).all()
        kept.append(data)
        with pytest.raises(ValueError, match="read-only"):
            burst.lengths[0] = 1

    program = vq.PythonProgram(look)
    found = run(["gen:count=50,size=60", "null:"], program)
    assert (found["null"]["to_null"]["packets"], program.error) == (50, None)
    assert sum(map(len, kept)) == 50 * 60


def test_a_program_that_raises_drops_everything(caplog: pytest.LogCaptureFixture) -> None:
    kept: list[vq.Burst] = []

    def faulty(burst: vq.Burst) -> None:
        kept.append(burst)
        raise RuntimeError("no idea")

    program = vq.PythonProgram(faulty)
    found = run(["gen:count=100,size=64", "null:"], program)
    assert found["null"]["to_null"]["packets"] == 0
    assert found["gen"]["from_gen"]["dropped"] == {"program": 100}
    assert str(program.error) == "no idea"
    assert caplog.text.count("dropping=all") == 1
    for use in (lambda: kept[0].lengths, lambda: kept[0].heads(4), lambda: kept[0].verdicts):
        with pytest.raises(ValueError, match="burst is over"):
            use()


def test_a_burst_is_refused_to_other_threads() -> None:
    """Which would look at packets that may have gone meanwhile."""
    errors: list[str] = []

    def look(burst: vq.Burst) -> None:
        def elsewhere() -> None:
            for use in (lambda: burst.lengths, lambda: burst.heads(4), burst.gather, lambda: burst.verdicts):
                with pytest.raises(ValueError, match="give copies of arrays to other threads") as caught:
                    use()
                errors.append(str(caught.value))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    run(["gen:count=10,size=64", "null:"], look)
    assert len(errors) >= 4


async def awaited(burst: vq.Burst) -> None:
    """What a newcomer to asyncio may write."""


def yielded(burst: vq.Burst) -> Any:
    yield burst.verdicts


@pytest.mark.parametrize(("program", "kind"), [(awaited, "coroutine"), (yielded, "generator")])
def test_what_is_not_run_by_a_call_is_refused(program: Any, kind: str) -> None:
    with pytest.raises(vq.UsageError, match=f"is a {kind}, which nobody runs"):
        as_program(program)


def test_what_a_module_prints_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "talks.py").write_text("print('hello')\ndef one(burst): pass\n")
    load_program(f"{tmp_path / 'talks.py'}:one")
    assert capsys.readouterr() == ("", "hello\n")


WRONG: list[Callable[[int], Any]] = [
    lambda count: np.zeros(3, int),
    lambda count: "text",
    lambda count: 5,
    lambda count: np.zeros((count, 2), int),
    lambda count: np.zeros(count),
    lambda count: np.zeros(count, bool),
    lambda count: np.full(count, 65536),  # whose low bits would let them pass
    lambda count: [-1] * count,
    lambda count: (verdict for verdict in [0] * count),
]


@pytest.mark.parametrize("answer", WRONG)
def test_verdicts_without_form_drop_everything(answer: Callable[[int], Any]) -> None:
    program = vq.PythonProgram(lambda burst: answer(burst.count))
    found = run(["gen:count=40,size=64", "null:"], program)
    assert found["gen"]["from_gen"]["dropped"] == {"program": 40}
    assert program.error is not None


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [(lambda count: DROP, "numpy.full"), (lambda count: np.ones(count, bool), r"numpy.where\(mask, DROP, PASS\)")],
)
def test_verdicts_without_form_are_told_with_what_to_write(answer: Callable[[int], Any], remedy: str) -> None:
    program = vq.PythonProgram(lambda burst: answer(burst.count))
    run(["gen:count=40,size=64", "null:"], program)
    assert re.search(remedy, str(program.error))


# -- misuse --


class Empty(vq.Program):
    """Somebody's subclass that forgot what it is for."""


class Unbound(vq.Program):
    def bound(self) -> Any:
        return None


@pytest.mark.parametrize("program", [vq.Program(), Empty(), Unbound()])
def test_a_program_without_a_function_is_refused(program: vq.Program) -> None:
    with pytest.raises(ValueError, match="no function to call"):
        Plan([(GenPort("gen"), 0, NullPort("null"), 0, program, 0)])
    with pytest.raises(vq.UsageError, match="no function to call"):
        vq.Pump(["gen:size=64", "null:"], program=program)


def test_a_class_is_no_program() -> None:
    with pytest.raises(vq.UsageError, match="give an object of it"):
        as_program(Empty, "mine:Empty")


def test_a_program_cannot_wait_for_its_own_worker() -> None:
    """It is told so, and the pump can still be stopped by whom it belongs to."""

    def ends(burst: vq.Burst) -> None:
        pump.stop()

    def takes_away(burst: vq.Burst) -> None:
        pump.workers[0].set_plan(Plan())

    for function, kind in ((ends, vq.UsageError), (takes_away, RuntimeError)):
        program = vq.PythonProgram(function)
        pump = vq.Pump(["gen:size=64,count=100", "null:"], program=program)  # known before the program is called
        with pump:
            found = pump.run(duration=60)["ports"]
        assert isinstance(program.error, kind)
        assert "request_stop" in str(program.error)
        assert found["gen"]["from_gen"]["dropped"] == {"program": 100}
        assert not any(thread.is_alive() for thread in pump._threads)


def test_a_program_may_ask_its_pump_to_stop() -> None:
    pump = vq.Pump(["gen:size=64", "null:"], program=lambda burst: pump.request_stop())
    with pump:
        assert pump.run(duration=60)["ports"]["null"]["to_null"]["packets"] > 0


# -- finding them --


def test_programs_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for words in (f"{EXAMPLES}/program.py:no_ipv6", "program:mirror"):
        program = load_program(words)
        assert run(["gen:count=64,size=64", "null:"], program)["null"]["to_null"]["packets"] == 64


def test_a_program_of_numba() -> None:
    program = load_program(f"{EXAMPLES}/program_numba.py:drop_short")
    found = run(["gen:count=64,size=60", "null:"], program)
    assert found["null"]["to_null"]["packets"] == 64


def test_what_numba_compiles_for_python_is_told_before() -> None:
    numba = pytest.importorskip("numba")
    with pytest.raises(vq.UsageError, match=r"make it by numba.cfunc"):
        as_program(numba.njit(lambda burst: None))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("program", "write module:function"),
        (f"{EXAMPLES}/program.py:mirror:twice", "write module:function"),
        ("no.such.module:f", "cannot be imported"),
        ("nowhere.py:f", "no file"),
        (f"{EXAMPLES}/program.py:nothing", "it has no_ipv6, mirror"),
        ("os:sep", "is of type str"),
    ],
)
def test_what_is_no_program_is_said(words: str, text: str) -> None:
    with pytest.raises(vq.UsageError, match=text):
        load_program(words)


@pytest.mark.parametrize("text", ["raise RuntimeError('no idea')", "import sys; sys.exit(3)", "def f(:"])
def test_a_module_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "faulty_program.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for words in ("faulty_program:f", f"{tmp_path}/faulty_program.py:f"):
        with pytest.raises(vq.UsageError, match="mend it"):
            load_program(words)


def test_what_would_drop_everything_is_told_before(library: ctypes.CDLL) -> None:
    """A function of C as it is, or a class, would raise with each burst."""
    with pytest.raises(vq.UsageError, match=r"wrap compiled code: vq.NativeProgram"):
        as_program(library.every_other)
    with pytest.raises(vq.UsageError, match="NativeProgram is a class"):
        as_program(vq.NativeProgram)  # type: ignore[arg-type]


def test_another_abi_is_refused(library: ctypes.CDLL) -> None:
    with pytest.raises(ValueError, match="made for ABI 2, this is 1"):
        vq.NativeProgram(library.every_other, abi=2)
    for wrong in (0, "text", object()):
        with pytest.raises(ValueError, match="address"):
            vq.NativeProgram(wrong, abi=1)
    with pytest.raises(vq.UsageError, match="wrap compiled code"):
        as_program(type("Compiled", (), {"address": 1})())


def test_the_command_line_takes_one() -> None:
    command = ["vq", "pump", "gen:count=10,size=64", "null:", "--json", "--program", f"{EXAMPLES}/program.py:no_ipv6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run([*command[:-1], "nowhere.py:f"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "no file nowhere.py" in wrong.stderr

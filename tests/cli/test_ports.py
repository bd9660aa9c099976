"""PORT arguments: what is understood, and what each mistake is told."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vq.errors import UsageError
from vq.port_kinds import KINDS, Option
from vq.ports import PortSpec, parse_port, parse_ports


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_port(text)
    return str(caught.value)


def test_vhost_with_every_option() -> None:
    spec = parse_port("vhost:/run/vq/a.sock,client,queues=4,layout=split,slots=off,queue-num=queues,mode=0660,mtu=9000")
    assert (spec.kind, spec.target, spec.name) == ("vhost", "/run/vq/a.sock", "vhost:/run/vq/a.sock")
    assert spec.flag("client")
    assert spec.number("queues") == 4
    assert spec.get("layout") == "split"
    assert spec.get("slots") == "off"
    assert spec.get("queue-num") == "queues"
    assert spec.number("mode") == 0o660
    assert spec.maybe_number("mtu") == 9000


def test_defaults_hold_without_being_written() -> None:
    spec = parse_port("vhost:a.sock")
    assert dict(spec.options) == {}
    assert spec.number("queues") == KINDS["vhost"].option("queues").default  # type: ignore[union-attr]
    assert spec.flag("client") is False
    assert spec.maybe_number("mtu") is None
    assert parse_port("pcap:f").real("speed") == 1.0
    assert parse_port("gen:").number("size") == 64


def test_kinds_without_target_take_options_at_once() -> None:
    assert parse_port("null:copy").flag("copy")
    assert not parse_port("null:").flag("copy")
    spec = parse_port("gen:size=1518,count=10,rate=1000")
    assert [spec.number(key) for key in ("size", "count", "rate")] == [1518, 10, 1000]


def test_a_spec_never_changes() -> None:
    spec = parse_port("gen:size=100")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.kind = "null"  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.options["size"] = 1  # type: ignore[index]
    with pytest.raises(KeyError):
        spec.get("queues")
    with pytest.raises(KeyError):
        spec.number("rate")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vhots:/a", ["unknown kind 'vhots'", *(kind.usage for kind in KINDS.values()), "did you mean vhost?"]),
        ("/run/a.sock", ["no KIND:TARGET", "did you mean vhost:/run/a.sock?"]),
        ("", ["no KIND:TARGET"]),
        ("tap", ["colon is missing", "write tap:NAME"]),
        ("vhost:", ["PATH is missing", "write vhost:PATH"]),
        ("vhost:,client", ["PATH is missing"]),
        ("vhost:a,queue=2", ["unknown option 'queue=2'", "queues=1..128", "client", "did you mean queues?"]),
        ("null:fast", ["unknown option 'fast'", "null: takes copy"]),
        ("echo:size=3", ["unknown option 'size=3'", "echo: takes none"]),
        ("vhost:a,", ["an option is empty", "leave out the comma"]),
        ("vhost:/tmp/a,b.sock", ["unknown option 'b.sock'", "a PATH cannot hold a comma"]),
        ("gen:64", ["unknown option '64'", "did you mean size=64?"]),
        ("gen:" + "9" * 5000, ["unknown option"]),
        ("vhost:a,queues=0", ["queues is 0, out of range", "1 to 128"]),
        ("vhost:a,queues=129", ["queues is 129, out of range"]),
        ("vhost:a,queues=many", ["queues is 'many'", "a whole number from 1 to 128"]),
        ("vhost:a,queues=", ["queues is ''"]),
        ("vhost:a,queues", ["queues needs a value", "queues=1..128"]),
        ("vhost:a,queues=+2", ["queues is '+2'"]),
        ("vhost:a,queues=1_0", ["queues is '1_0'"]),
        ("vhost:a,queues=\u0663", ["a whole number"]),
        ("vhost:a,queues=2,queues=3", ["queues is given twice"]),
        ("vhost:a,client=yes", ["client takes no value"]),
        ("vhost:a,layout=triangle", ["layout is 'triangle'", "possible: packed, split"]),
        ("vhost:a,mode=888", ["mode is '888'", "an octal number from 0000 to 0777"]),
        ("vhost:a,mode=7777", ["mode is 7777, out of range"]),
        ("vhost:" + "x" * 108, ["108 bytes", "107"]),
        ("vhost:\u00e9" + "x" * 106, ["108 bytes"]),
        ("vhost:a\0b", ["zero byte"]),
        ("tap:" + "x" * 16, ["16 bytes", "15"]),
        ("tap:a/b", ["cannot name an interface"]),
        ("tap:a b", ["cannot name an interface"]),
        ("tap:vq%d", ["cannot name an interface"]),
        ("tap:..", ["cannot name an interface"]),
        ("pcap:f,speed=nan", ["speed is 'nan'"]),
        ("pcap:f,speed=-1", ["speed is '-1'"]),
        ("pcap:f,write,speed=2", ["speed is for replaying"]),
        ("pcap:f,snaplen=100", ["snaplen is for writing", "add write"]),
        ("gen:size=59", ["size is 59, out of range", "60 to 9216"]),
    ],
)
def test_each_mistake_is_named(text: str, parts: list[str]) -> None:
    message = refusal(text)
    for part in parts:
        assert part in message, message
    assert "\n" not in message


def test_longest_targets_pass() -> None:
    assert parse_port("vhost:" + "x" * 107).target == "x" * 107
    assert parse_port("tap:" + "x" * 15).target == "x" * 15


def test_names_of_a_pump_are_unique() -> None:
    specs = parse_ports(["gen:", "gen:size=100", "null:", PortSpec("gen"), "tap:a"])
    assert [spec.name for spec in specs] == ["gen", "gen-2", "null", "gen-3", "tap:a"]
    twice = parse_ports(["pcap:f", "pcap:f,loop=2"])
    assert len({spec.name for spec in twice}) == 2


@pytest.mark.parametrize(
    "texts",
    [
        ("vhost:/run/a.sock", "vhost:/run/../run/a.sock,client"),
        ("tap:a", "tap:a,queues=2"),
        ("pcap:f,write", "pcap:./f"),
        ("vhost:f", "pcap:f,write"),
    ],
)
def test_one_resource_cannot_be_two_ports(texts: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="each port needs one of its own"):
        parse_ports(texts)


def test_one_file_under_two_names_cannot_be_two_ports(tmp_path: Path) -> None:
    first, second, other = tmp_path / "h1.pcap", tmp_path / "h2.pcap", tmp_path / "h3.pcap"
    first.write_bytes(b"x")
    second.hardlink_to(first)
    other.write_bytes(b"x")
    with pytest.raises(UsageError, match="the same file as"):
        parse_ports([f"pcap:{first}", f"pcap:{second},write"])
    assert len(parse_ports([f"pcap:{first}", f"pcap:{other},write"])) == 2
    assert len(parse_ports([f"pcap:{first}", f"pcap:{second}"])) == 2


def test_an_interface_and_a_file_may_have_one_name() -> None:
    assert len(parse_ports(["tap:a", "vhost:a"])) == 2


def test_no_port_at_all() -> None:
    with pytest.raises(UsageError, match="at least one PORT"):
        parse_ports([])


def _values(option: Option) -> st.SearchStrategy[str | None]:
    if option.form == "flag":
        return st.just(None)
    if option.form == "mac":
        return st.sampled_from(["52:54:00:12:34:56", "02:00:00:00:00:FF"])
    if option.form == "choice":
        return st.sampled_from(option.choices)
    if option.form == "real":
        return st.floats(option.low, option.high).map(lambda value: f"{value:.6f}")
    form = "o" if option.form == "octal" else "d"
    return st.integers(int(option.low), int(option.high)).map(lambda value: format(value, form))


@st.composite
def port_texts(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(list(KINDS.values())))
    options = draw(st.permutations(kind.options))[: draw(st.integers(0, len(kind.options)))]
    words = [option.key if (value := draw(_values(option))) is None else f"{option.key}={value}" for option in options]
    keys = {word.partition("=")[0] for word in words}
    if kind.name == "vhost":
        without = {"postcopy"} if "control" in keys else {"mac", "speed"}
        words = [word for word in words if word.partition("=")[0] not in without]
    if kind.name == "pcap":
        words = [
            word for word in words if (word.partition("=")[0] == "snaplen") == ("write" in keys) or word == "write"
        ]
    return f"{kind.name}:" + ",".join((["target"] if kind.target else []) + words)


@given(port_texts())
def test_what_a_spec_prints_means_the_same(text: str) -> None:
    spec = parse_port(text)
    again = parse_port(str(spec))
    assert again.kind == spec.kind
    assert again.target == spec.target
    assert dict(again.options) == dict(spec.options)


@given(st.text(alphabet=st.sampled_from("vhostapgenulcq:,=/0129.- é\0"), max_size=40))
def test_any_text_is_a_port_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert parse_port(text).kind in KINDS

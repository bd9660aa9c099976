"""`vq qemu` and `vq libvirt`: each option of a port, each version of QEMU, and what is refused."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vq.cli.guest_options import Link, guest_links, parse_memory
from vq.cli.libvirt import domain_parts
from vq.cli.qemu import Version, installed_version, parse_version, qemu_options
from vq.errors import UsageError
from vq.ports import PortSpec, parse_port


def link(options: str = "") -> Link:
    return Link.of(parse_port(f"vhost:/run/a.sock{options}"), "/run/a.sock")


def words(options: str = "", **more: object) -> str:
    return " ".join(qemu_options(link(options), **more))  # type: ignore[arg-type]


def interface(text: str) -> Mapping[str, dict[str, str]]:
    """The attributes of each element in the interface of a domain."""
    (found,) = ElementTree.fromstring(text).findall("devices/interface")
    return {element.tag: dict(element.attrib) for element in found.iter()}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vq", *arguments], capture_output=True, text=True, timeout=120)


def test_qemu_takes_the_role_that_the_port_leaves() -> None:
    assert "path=/run/a.sock,reconnect-ms=1000 " in words()
    assert "path=/run/a.sock,server=on,wait=off " in words(",client")
    assert "share=on -machine memory-backend=vqmem -m 1G" in words()


@pytest.mark.parametrize(
    ("version", "option"), [((10, 0), "reconnect-ms=1000"), ((9, 2), "reconnect-ms=1000"), ((9, 1), "reconnect=1")]
)
def test_reconnecting_is_spelled_as_the_version_wants_it(version: tuple[int, int], option: str) -> None:
    assert f"{option} " in words(version=Version(*version))


def test_qemu_is_told_of_the_pairs_that_were_asked_for() -> None:
    assert "chardev=vq3,queues=4 " in words(",queues=4", number=3)
    assert "netdev=vqnet3,mq=on,vectors=10," in words(",queues=4", number=3)
    assert "mq=on" not in words()
    assert "queues=" not in words()


def test_qemu_is_told_of_rings_and_mtu() -> None:
    assert words().endswith("rx_queue_size=1024,tx_queue_size=1024,packed=on")
    assert words(",layout=split,mtu=9000", ring_size=256).endswith("rx_queue_size=256,tx_queue_size=256,host_mtu=9000")


def test_memory_is_the_same_in_both_places() -> None:
    assert "size=512M,share=on" in words(memory_mib=512)
    assert "-m 512M" in words(memory_mib=512)


def test_a_comma_in_a_path_is_doubled() -> None:
    assert "path=/run/a,,b," in " ".join(qemu_options(Link.of(PortSpec("vhost", "/run/a,b"), "/run/a,b")))


def test_libvirt_names_the_role_of_qemu() -> None:
    listens = interface(domain_parts(link()))
    assert listens["source"] == {"type": "unix", "path": "/run/a.sock", "mode": "client"}
    assert listens["reconnect"] == {"enabled": "yes", "timeout": "1"}
    connects = interface(domain_parts(link(",client")))
    assert connects["source"]["mode"] == "server"
    assert "reconnect" not in connects


def test_libvirt_says_what_the_line_of_qemu_says() -> None:
    sizes = {"rx_queue_size": "512", "tx_queue_size": "512"}
    text = domain_parts(link(",queues=4,mtu=9000"), memory_mib=512, ring_size=512)
    assert interface(text)["driver"] == {"queues": "4", "packed": "on"} | sizes
    assert interface(text)["mtu"] == {"size": "9000"}
    domain = ElementTree.fromstring(text)
    assert (domain.findtext("memory"), domain.find("memory").get("unit")) == ("512", "MiB")  # type: ignore[union-attr]
    assert domain.find("memoryBacking/source").get("type") == "memfd"  # type: ignore[union-attr]
    assert domain.find("memoryBacking/access").get("mode") == "shared"  # type: ignore[union-attr]
    assert interface(domain_parts(link(",layout=split"), ring_size=512))["driver"] == sizes


def test_a_path_with_signs_of_xml_is_escaped() -> None:
    text = domain_parts(Link.of(PortSpec("vhost", "/run/<&\"'"), "/run/<&\"'"))
    assert interface(text)["source"]["path"] == "/run/<&\"'"


def test_only_guests_have_lines_and_their_paths_are_absolute() -> None:
    links = guest_links(["vhost:a.sock", "tap:vq0", "+", "vhost:/b.sock,client"])
    assert [(each.path, each.listens) for each in links] == [(str(Path.cwd() / "a.sock"), False), ("/b.sock", True)]


def test_an_inherited_socket_is_found_by_its_path(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        with pytest.raises(UsageError, match="listens on no path"):
            guest_links([f"vhost:fd={sock.fileno()}"])
        sock.bind(str(tmp_path / "a.sock"))
        sock.listen()
        assert [each.path for each in guest_links([f"vhost:fd={sock.fileno()}"])] == [str(tmp_path / "a.sock")]


@pytest.mark.parametrize(("text", "mib"), [("512M", 512), ("1G", 1024), ("2g", 2048)])
def test_memory_is_read(text: str, mib: int) -> None:
    assert parse_memory(text) == mib


@pytest.mark.parametrize("text", ["", "1", "0G", "1.5G", "1GiB", "-1G", "1G "])
def test_other_forms_of_memory_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write mebibytes or gibibytes"):
        parse_memory(text)


def test_versions_are_read() -> None:
    assert parse_version("8.2.1") == parse_version("8.2") == (8, 2)
    assert parse_version("10.0") > parse_version("9.2")
    for text in ("8", "new", "", "1.2.3.4"):
        with pytest.raises(UsageError, match=r"write such as 8\.2"):
            parse_version(text)
    with pytest.raises(UsageError, match=r"need QEMU 5\.0"):
        parse_version("4.2")


def test_a_machine_without_qemu_gets_the_newest_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vq.cli.qemu._programs", lambda: ("no-such-program",))
    assert installed_version() is None


@pytest.mark.parametrize(
    ("said", "version"), [("QEMU emulator version 7.2.19 (Debian)", (7, 2)), ("what?", None)], ids=["7.2", "silent"]
)
def test_the_installed_qemu_is_asked(
    said: str, version: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setattr("vq.cli.qemu._programs", lambda: (str(program),))
    assert installed_version() == version


def test_json_has_a_line_for_each_guest() -> None:
    ports = ["vhost:/run/a.sock", "vhost:/run/b.sock,client"]
    done = run("qemu", *ports, "--json", "--qemu-version", "8.2")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["port"] for line in lines] == ["vhost:/run/a.sock", "vhost:/run/b.sock"]
    assert lines[0]["qemu"] == "8.2"
    assert "socket,id=vq1,path=/run/b.sock,server=on,wait=off" in lines[1]["options"]
    done = run("libvirt", *ports, "--json")
    texts = [json.loads(line)["xml"] for line in done.stdout.splitlines()]
    assert [interface(text)["source"]["mode"] for text in texts] == ["client", "server"]


@pytest.mark.parametrize("command", ["qemu", "libvirt"])
def test_text_names_the_ports_if_there_are_several(command: str) -> None:
    one, two = (run(command, *ports) for ports in (["vhost:/a"], ["vhost:/a", "vhost:/b"]))
    assert (one.returncode, two.returncode) == (0, 0)
    assert one.stdout[0] in "-<"
    assert "vhost:/b" not in one.stdout
    marks = [line for line in two.stdout.splitlines() if line.startswith(("# ", "<!-- "))]
    assert [mark.strip("#<!- >") for mark in marks] == ["vhost:/a", "vhost:/b"]


def test_ports_without_a_guest_are_refused() -> None:
    done = run("qemu", "tap:vq0", "null:")
    assert done.returncode == 2
    assert "no PORT is a guest" in done.stderr
    assert "See vq qemu --help" in done.stderr


def test_an_old_qemu_is_warned_of() -> None:
    done = run("qemu", "vhost:/a", "--qemu-version", "7.2")
    assert done.returncode == 0
    assert "use QEMU 8.0 or newer" in done.stderr

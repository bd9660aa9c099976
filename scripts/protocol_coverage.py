"""Make docs/protocol-coverage.md: each message and each feature bit, what becomes of it, and the tests that show it.

States come from the tables of the program, tests from their marks: ``@pytest.mark.shows("SET_MEM_TABLE")`` names
messages and bits as `vq.message` and `vq.virtio` do, with ``BACKEND_`` before a request of the back-end, or one of
`GROUPS`. Run it in a checkout: ``python scripts/protocol_coverage.py > docs/protocol-coverage.md``.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vq import virtio as v  # noqa: E402
from vq.devices import blk, net  # noqa: E402
from vq.message import BACKEND_REQUESTS, FRONTEND_REQUESTS, BackendRequest, Request, Rule  # noqa: E402
from vq.offer import POSTCOPY, SERVED_PROTOCOL_FEATURES  # noqa: E402
from vq.session import TRANSITIONS  # noqa: E402

DONE: Final = "done"
REFUSED: Final = "refused cleanly"
NOT_YET: Final = "not yet"
UNOFFERED: Final = "done, not offered by net and blk"
CONTROL: Final = "done, with control"

FEATURES: Final = "any feature that is not offered"
PROTOCOL_FEATURES: Final = "any protocol feature that is not offered"
GROUPS: Final = (FEATURES, PROTOCOL_FEATURES)

OFFERED: Final = net.FEATURES | net.CONTROL_FEATURES | blk.FEATURES
OFFERED_PROTOCOL: Final = (
    net.PROTOCOL_FEATURES | net.CONTROL_PROTOCOL_FEATURES | blk.PROTOCOL_FEATURES | POSTCOPY  # that by an option
)
BITS: Final = 64
NET: Final = ("VIRTIO_NET_F_",)
BLK: Final = ("VIRTIO_BLK_F_",)
PROTOCOL: Final = ("VHOST_USER_PROTOCOL_F_",)
NONE: Final = "NONE"  # the name of id 0, which is no request

HEAD: Final = """\
# Protocol coverage

Made by `scripts/protocol_coverage.py` from the message table, the offers of the devices and the marks of the tests.

| state | means |
|---|---|
| done | served or offered, and shown by the tests beside it |
| done, with control | the same, of a network device that has a control queue (`vhost:PATH,control`); of others \
refused |
| done, not offered by net and blk | served for a device of yours that offers it, as in the tests; these two \
have no use for it |
| refused cleanly | not offered. Used nevertheless, it is nacked, or ends the connection where no answer could say no; \
nothing else changes |
| not yet | not built, and nothing that a front-end could bring up |
"""


class Test(NamedTuple):
    """A test function, and where it stands below the checkout."""

    path: str
    name: str


class Row(NamedTuple):
    """One message or bit."""

    number: str
    name: str
    needs: str
    state: str
    tests: tuple[Test, ...]


def marks() -> dict[str, list[Test]]:
    """The tests of each word in a mark, by file and line."""
    found: dict[str, list[Test]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.shows":
                    test = Test(path.relative_to(ROOT).as_posix(), node.name)
                    for argument in decorator.args:
                        found.setdefault(ast.literal_eval(argument), []).append(test)
    return found


def _named(prefixes: tuple[str, ...]) -> dict[int, str]:
    """Bit numbers, which must not overlap, and full names of the constants of `vq.virtio` that begin so."""
    return {bit: name for prefix in prefixes for name, bit in vars(v).items() if name.startswith(prefix)}


def _needs(rule: Rule) -> str:
    """What must be negotiated, and what offered."""
    protocol, feature = rule.gate
    words = [] if protocol is None else [_named(PROTOCOL)[protocol]]
    words += [] if feature is None else [(_named(NET) | _common())[feature]]
    return ", ".join(words)


def _common() -> dict[int, str]:
    return _named(("VIRTIO_F_", "VHOST_F_", "VHOST_USER_F_"))


def _offerable(rule: Rule) -> bool:
    """Whether a device offers all that a request needs."""
    protocol, feature = rule.gate
    return (protocol is None or v.has(OFFERED_PROTOCOL, protocol)) and (feature is None or v.has(OFFERED, feature))


def frontend_rows(tests: Mapping[str, list[Test]]) -> Iterator[Row]:
    """Requests of the front-end, by id; and id 0."""
    yield Row("0", NONE, "", REFUSED, tuple(tests.get(NONE, ())))
    for number, rule in FRONTEND_REQUESTS.items():
        name = Request(number).name
        state = REFUSED if number not in TRANSITIONS else DONE if _offerable(rule) else UNOFFERED
        yield Row(str(int(number)), name, _needs(rule), state, tuple(tests.get(name, ())))


def backend_rows(tests: Mapping[str, list[Test]]) -> Iterator[Row]:
    """Requests of the back-end, by id: no table says which of them are sent, so the tests do."""
    for number, rule in BACKEND_REQUESTS.items():
        name = BackendRequest(number).name
        shown = tuple(tests.get(f"BACKEND_{name}", ()))
        yield Row(str(int(number)), name, _needs(rule), DONE if shown else NOT_YET, shown)


def _others(named: Iterable[int], state: str, tests: tuple[Test, ...]) -> Row:
    """The bits without a name, as ranges in one row."""
    bits = sorted(set(range(BITS)) - set(named))
    firsts = [bit for bit in bits if bit - 1 not in bits]
    lasts = [bit for bit in bits if bit + 1 not in bits]
    ranges = [str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True)]
    return Row(", ".join(ranges), "all others", "", state, tests)


def protocol_rows(tests: Mapping[str, list[Test]]) -> Iterator[Row]:
    """Protocol feature bits."""
    refused = tuple(tests.get(PROTOCOL_FEATURES, ()))
    names = _named(PROTOCOL)
    for bit, name in sorted(names.items()):
        shown = tuple(tests.get(name, ()))
        if v.has(OFFERED_PROTOCOL, bit):
            yield Row(str(bit), name, "", DONE, shown)
        elif v.has(SERVED_PROTOCOL_FEATURES, bit) and shown:
            yield Row(str(bit), name, "", UNOFFERED, shown)
        else:
            yield Row(str(bit), name, "", REFUSED, refused)
    yield _others(names, REFUSED, refused)


def feature_rows(
    tests: Mapping[str, list[Test]], prefixes: tuple[str, ...], features: int, control: int = 0
) -> Iterator[Row]:
    """Feature bits of a device that offers `features`, and `control` by an option, device-independent ones included."""
    refused = tuple(tests.get(FEATURES, ()))
    names = _named(prefixes) | _common()
    for bit, name in sorted(names.items()):
        state = DONE if v.has(features, bit) else CONTROL if v.has(control, bit) else REFUSED
        yield Row(str(bit), name, "", state, refused if state == REFUSED else tuple(tests.get(name, ())))
    yield _others(names, REFUSED, refused)


def tables() -> dict[str, list[Row]]:
    """All rows under the headings of the page.

    Raises
    ------
    ValueError
        A mark names nothing that there is.
    """
    tests = marks()
    known = {NONE, *GROUPS, *(request.name for request in Request)}
    known |= {f"BACKEND_{request.name}" for request in BackendRequest}
    known |= {name for names in (_common(), _named(NET), _named(BLK), _named(PROTOCOL)) for name in names.values()}
    unknown = sorted(set(tests) - known)
    if unknown:
        raise ValueError(f"marks name what is no message, bit or group: {', '.join(unknown)}")
    return {
        "Requests of the front-end": list(frontend_rows(tests)),
        "Requests of the back-end": list(backend_rows(tests)),
        "Protocol features": list(protocol_rows(tests)),
        "Features of the network device": list(feature_rows(tests, NET, net.FEATURES, net.CONTROL_FEATURES)),
        "Features of the block device": list(feature_rows(tests, BLK, blk.FEATURES)),
    }


def _line(row: Row, needs: bool) -> str:
    shown = ", ".join(f"[{test.name}](../{test.path})" for test in row.tests)
    cells = [row.number, row.name, *([row.needs] if needs else []), row.state, shown]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole file."""
    lines = [HEAD]
    for title, rows in tables().items():
        needs = title.startswith("Requests")
        states = Counter(row.state for row in rows)
        lines += [f"## {title}", "", f"Rows: {', '.join(f'{count} {state}' for state, count in states.items())}.", ""]
        lines.append(f"| {'id' if needs else 'bit'} | name | {'needs | ' if needs else ''}state | shown by |")
        lines.append(f"|---|---|{'---|' if needs else ''}---|---|")
        lines += [_line(row, needs) for row in rows]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")

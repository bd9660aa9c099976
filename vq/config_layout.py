"""The configuration space of a device as a class: fields with names, of the integer types of the specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, Any, ClassVar, Final, get_args, get_type_hints

from vq.errors import FrontendError, UsageError
from vq.payload import CONFIG_MAX

__all__ = ["ConfigLayout", "le16", "le32", "le64", "u8", "writable"]

ANNOTATE: Final = "annotate it with vq.u8, vq.le16, vq.le32, vq.le64 or Annotated[bytes, LENGTH]"


@dataclass(frozen=True, slots=True)
class _Unsigned:
    """Marks an integer type with its size in bytes."""

    size: int


u8 = Annotated[int, _Unsigned(1)]
le16 = Annotated[int, _Unsigned(2)]
le32 = Annotated[int, _Unsigned(4)]
le64 = Annotated[int, _Unsigned(8)]


@dataclass(frozen=True, slots=True)
class _Writable:
    default: Any


def writable(default: Any = 0) -> Any:
    """Let a driver write a field of a `ConfigLayout`; its value in the beginning is `default`."""
    return _Writable(default)


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    offset: int
    size: int
    number: bool  # else bytes
    writable: bool
    default: Any

    def check(self, value: Any) -> Any:
        """Give the value back if it fits."""
        if self.number:
            if isinstance(value, int) and 0 <= value < 1 << 8 * self.size:
                return int(value)
            raise UsageError(f"config field {self.name} is {value!r}; it must be 0 to {(1 << 8 * self.size) - 1}")
        if isinstance(value, bytes) and len(value) <= self.size:
            return value.ljust(self.size, b"\0")
        raise UsageError(f"config field {self.name} is {value!r}; it must be bytes, {self.size} at most")

    def pack(self, value: Any) -> bytes:
        return value.to_bytes(self.size, "little") if self.number else bytes(value)

    def unpack(self, data: bytes) -> Any:
        part = data[self.offset : self.offset + self.size]
        return int.from_bytes(part, "little") if self.number else part


class ConfigLayout:
    """Base of configuration spaces: a subclass names its fields in the order of the specification.

    Fields are annotated with `u8`, `le16`, `le32` or `le64`, or with ``Annotated[bytes, 6]`` for that many bytes; what
    is assigned to one in the class is its value in the beginning, 0 without. They lie one behind the other without
    gaps, little-endian (VIRTIO 1.3, 4.2.2.2). The driver can write a field whose value is ``writable(default)``.

    Assigning to a field changes what the driver reads, and tells it (CONFIG_CHANGE_MSG); several at once by `update`.

    Raises
    ------
    UsageError
        A field has another type or none, the space is larger than 256 bytes, or a value does not fit.

    Examples
    --------
    ::

        class Config(vq.ConfigLayout):
            capacity: vq.le64 = 2048
            writeback: vq.u8 = vq.writable(1)
    """

    SIZE: ClassVar[int] = 0
    _fields: ClassVar[dict[str, _Field]] = {}
    _values: dict[str, Any]
    _changed: Callable[[], None]
    _lock: Lock  # no callback is called under it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        fields = {}
        offset = 0
        for name, kind in get_type_hints(cls, include_extras=True).items():
            if name in ConfigLayout.__annotations__:
                continue
            if hasattr(ConfigLayout, name):
                raise UsageError(f"{cls.__name__}.{name} hides what vq.ConfigLayout itself has; take another name")
            size, number = _size(cls, name, kind)
            value = getattr(cls, name, 0 if number else b"")
            default = value.default if isinstance(value, _Writable) else value
            found = _Field(name, offset, size, number, isinstance(value, _Writable), default)
            found.check(default)
            fields[name] = found
            offset += size
        for name, value in vars(cls).items():
            # A name with an underscore is a constant of the class.
            plain = isinstance(value, int | bytes) and not name.startswith("_")
            if name not in fields and (plain or isinstance(value, _Writable)):
                raise UsageError(f"{cls.__name__}.{name} has no type, so that it would be no field; {ANNOTATE}")
        if offset > CONFIG_MAX:
            raise UsageError(f"{cls.__name__} has {offset} bytes; a configuration space has at most {CONFIG_MAX}")
        cls._fields = fields
        cls.SIZE = offset

    def __init__(self, **values: Any) -> None:
        object.__setattr__(self, "_lock", Lock())
        object.__setattr__(self, "_changed", lambda: None)
        object.__setattr__(self, "_values", {f.name: f.check(f.default) for f in self._fields.values()})
        self.update(**values)

    def __getattribute__(self, name: str) -> Any:
        fields = type(self)._fields
        return object.__getattribute__(self, "_values")[name] if name in fields else object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.update(**{name: value})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"

    def update(self, **values: Any) -> None:
        """Change fields, and tell the driver once if that makes a difference; from any thread."""
        for name in values:
            if name not in self._fields:
                known = ", ".join(self._fields) or "none"
                raise UsageError(f"{type(self).__name__} has no field {name}; it has {known}")
        checked = {name: self._fields[name].check(value) for name, value in values.items()}
        with self._lock:
            new = self._values | checked
            differs = new != self._values
            object.__setattr__(self, "_values", new)
        if differs:
            self._changed()

    def pack(self) -> bytes:
        """The bytes that a driver reads."""
        values = self._values  # never changed, only replaced
        return b"".join(field.pack(values[field.name]) for field in self._fields.values())

    def write(self, offset: int, data: bytes, *, migration: bool) -> frozenset[str]:
        """Take over what a driver writes (SET_CONFIG).

        Parameters
        ----------
        offset, data
            Inside of the space.
        migration
            The whole space of where the guest comes from: only fields that a driver can write count.

        Returns
        -------
        frozenset of str
            Fields that have another value now.

        Raises
        ------
        FrontendError
            A byte lies in a field that is read-only; nothing was changed.
        """
        touched = [f for f in self._fields.values() if f.offset < offset + len(data) and offset < f.offset + f.size]
        for field in touched:
            if not (field.writable or migration):
                limit = "the driver must not write it; " + _writable_names(self._fields)
                raise FrontendError("SET_CONFIG", "field", field.name, limit)
        with self._lock:
            space = bytearray(self.pack())
            space[offset : offset + len(data)] = data
            values = {field.name: field.unpack(bytes(space)) for field in touched if field.writable}
            changed = frozenset(name for name, value in values.items() if value != self._values[name])
            object.__setattr__(self, "_values", self._values | values)
        return changed


def _size(cls: type, name: str, kind: Any) -> tuple[int, bool]:
    """How long a field is, and whether it is a number."""
    match get_args(kind):
        case (base, _Unsigned(size)) if base is int:
            return size, True
        case (base, int(size)) if base is bytes and size > 0:
            return size, False
    raise UsageError(f"{cls.__name__}.{name} is of no type of a configuration space; {ANNOTATE}")


def _writable_names(fields: dict[str, _Field]) -> str:
    names = [field.name for field in fields.values() if field.writable]
    return f"it may write {', '.join(names)}" if names else "it may write none"

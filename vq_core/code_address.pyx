"""Where a compiled function lies, whatever its owner calls it by."""
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetName, PyCapsule_GetPointer
from libc.stdint cimport uintptr_t

import ctypes

# What Cython calls the type of a function that fulfils the contract, in a capsule of `__pyx_capi__`.
_SIGNATURE = "uint32_t (void *, struct __pyx_t_7vq_core_4port_packet_t const *, uint16_t *, uint32_t)"


cdef bint _of_cffi(function):
    return type(function).__module__ == "_cffi_backend"


def is_compiled(function):
    """Whether something is code that `code_address` finds, though Python could call it too."""
    return hasattr(function, "address") or isinstance(function, ctypes._CFuncPtr) or _of_cffi(function)


def code_address(function):
    """The address of a compiled function.

    Parameters
    ----------
    function : int, ctypes function, cffi function, numba.cfunc, or capsule
        Its address, or something that has one.

    Returns
    -------
    int
        Where code of this process lies.

    Raises
    ------
    ValueError
        It is nothing with an address, no code lies there, or a capsule has a function of another type.
    """
    if PyCapsule_CheckExact(function):
        found = (PyCapsule_GetName(function) or b"").decode()
        if found != _SIGNATURE:
            raise ValueError(f"the program is a function {found}; it must be of type uint32_t (void *, "
                             "const packet_t *, uint16_t *, uint32_t), with packet_t cimported from vq_core")
        return <uintptr_t>PyCapsule_GetPointer(function, PyCapsule_GetName(function))
    if isinstance(function, int) and not isinstance(function, bool):
        address = function
    elif hasattr(function, "address"):
        address = function.address
    elif isinstance(function, ctypes._CFuncPtr):
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
    elif _of_cffi(function):
        import cffi

        address = int(cffi.FFI().cast("uintptr_t", function))
    else:
        raise ValueError(f"the program is {function!r}; it must be an address, a function of ctypes or cffi, a "
                         "numba.cfunc or a capsule of Cython")
    if not (isinstance(address, int) and _is_code(address)):
        where = f"{address:#x}" if isinstance(address, int) else repr(address)
        raise ValueError(f"the program has the address {where}, where no code lies")
    return address


def _is_code(address):
    """Whether an address lies in what the process may execute; where the kernel does not tell, only 0 does not."""
    if address <= 0:
        return False
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, permissions = line.split(maxsplit=2)[:2]
                if "x" in permissions:
                    begin, end = (int(bound, 16) for bound in span.split("-"))
                    if begin <= address < end:
                        return True
    except OSError:
        return True
    return False

"""Shared objects and shared memory regions, as far as the back-end is asked for them."""

from __future__ import annotations

import os
from uuid import uuid4

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target

OBJECTS = (v.VHOST_USER_PROTOCOL_F_SHARED_OBJECT, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ)
SHMEM = (v.VHOST_USER_PROTOCOL_F_SHMEM, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ)
SECTION = "vhost-user, Front-end message types: "


@check(SECTION + "GET_SHARED_OBJECT", protocol=OBJECTS)
def unknown_object(target: Target) -> None:
    """An object that nobody shares is answered without a descriptor."""
    with target.negotiate(protocol=BASIC_PROTOCOL | v.mask(*OBJECTS)) as frontend:
        fd = frontend.get_shared_object(uuid4())
        if fd is not None:
            os.close(fd)
            raise Failed("a descriptor came")


@check(SECTION + "GET_SHMEM_CONFIG", protocol=SHMEM)
def shmem_config(target: Target) -> str:
    """The regions have whole pages, and are the same each time."""
    found = []
    for _ in range(2):
        with target.negotiate(protocol=BASIC_PROTOCOL | v.mask(*SHMEM)) as frontend:
            found += [frontend.get_shmem_config() for _ in range(2)]
    if any(sizes != found[0] for sizes in found):
        raise Failed("the regions differ from one time to the next")
    return f"{len(found[0])} regions"

"""What an in-flight region says at the start of a ring: repair, place of the ring, requests to do once more.

Whoever wrote the region may have ended between any two stores (see inflight.pxd), or may be a back-end of another make,
or mean harm. Each word is read once. What contradicts itself is refused, and the ring does not start: whatever was
guessed might be a request that is done twice, or lost. All repairs can be cut anywhere and done again.

Spec: vhost-user, "Inflight I/O tracking": "When reconnecting".
"""
from vq_core.inflight cimport InflightQueue
from vq_core.ring cimport ring_t

# Repair the region and place the ring by it, or make a fresh one ready, which leaves the ring where it is. ValueError
# if the region contradicts itself or its ring. The ring must be placed by its base, and used by nobody.
cdef int inflight_resume(InflightQueue queue, ring_t* ring, int index) except -1

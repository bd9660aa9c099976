"""Counters: their names and snapshots."""

DROP_NAMES = ("disabled", "no_descriptors", "too_short", "too_long", "bad_csum", "bad_gso", "segments", "mtu",
              "not_connected", "io_error", "no_target")


cdef dict counters_snapshot(counters_t* counters):
    cdef int cause
    dropped = {DROP_NAMES[cause]: counters.dropped[cause] for cause in range(DROP_CAUSES) if counters.dropped[cause]}
    return {"packets": counters.packets, "bytes": counters.bytes, "dropped": dropped}

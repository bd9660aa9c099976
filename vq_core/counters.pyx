"""Counters: their names and snapshots."""

DROP_NAMES = ("disabled", "no_descriptors", "too_short", "too_long", "bad_csum", "bad_gso", "segments", "mtu",
              "not_connected", "io_error", "no_target", "filtered", "program")

BURST_NAMES = ("1", "2-3", "4-7", "8-15", "16-31", "32")


cdef dict counters_snapshot(counters_t* counters):
    cdef int cause
    dropped = {DROP_NAMES[cause]: counters.dropped[cause] for cause in range(DROP_CAUSES) if counters.dropped[cause]}
    return {"packets": counters.packets, "bytes": counters.bytes, "dropped": dropped}


cdef dict counters_work(counters_t* counters):
    cdef int i
    return {"busy_cycles": counters.cycles,
            "cycles_per_packet": round(<double>counters.cycles / max(<double>counters.packets, 1.0), 1),
            "empty_polls": counters.empty_polls,
            "bursts": {BURST_NAMES[i]: counters.bursts[i] for i in range(BURST_BINS) if counters.bursts[i]}}

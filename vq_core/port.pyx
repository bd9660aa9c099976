"""The base of all ports: their endpoints and who owns them."""
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from vq_core.counters cimport DROP_CAUSES, DROP_NOT_CONNECTED, counters_snapshot, counters_t


# What an endpoint does until its port says otherwise: it has no packets, and room for all, whom it drops.

cdef int _pull_nothing(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    burst.count = 0
    return 0


cdef int _push_away(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    endpoint.pushed.dropped[DROP_NOT_CONNECTED] += count
    return count


cdef void _release_nothing(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil:
    pass


cdef void _flush_nothing(endpoint_t* endpoint) noexcept nogil:
    pass


cdef int _room_for_all(endpoint_t* endpoint) noexcept nogil:
    return BURST_MAX


cdef int _arm_nothing(endpoint_t* endpoint, int what) noexcept nogil:
    return 0


cdef void _attach_nothing(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    pass


cdef class Port:
    """A port: a name and one endpoint for each queue pair.

    Attributes
    ----------
    name : str
    endpoint_count : int
    mailboxes : list of (Mailbox or None)
        The mailbox of the worker that owns each endpoint.

    Notes
    -----
    Threading: created and destroyed by the control thread; an endpoint is used by one worker at a time.
    """

    #: What people call the two directions: (pushed, pulled).
    directions = ("to_port", "from_port")

    #: Endpoints are interchangeable: a pump uses as many of them as its other ports can feed or take.
    elastic = False

    @property
    def sources(self):
        """list of int: endpoints that packets come from at the moment."""
        return list(range(self.endpoint_count))

    @property
    def targets(self):
        """list of int: endpoints that take packets at the moment."""
        return list(range(self.endpoint_count))

    @property
    def finished(self):
        """bool: no packet will ever come from this port again."""
        return not self.sources

    cdef int allocate(self, int count) except -1:
        """Make `count` endpoints with counters of their own, without packets or use for any; for subclasses."""
        cdef int i
        cdef counters_t* counters
        self.endpoints = <endpoint_t**>calloc(count, sizeof(endpoint_t*))
        if self.endpoints == NULL:
            raise MemoryError("endpoints")
        self.endpoint_count = count
        self.mailboxes = [None] * count
        for i in range(count):
            self.endpoints[i] = <endpoint_t*>calloc(1, sizeof(endpoint_t))
            counters = <counters_t*>calloc(2, sizeof(counters_t))
            if self.endpoints[i] == NULL or counters == NULL:
                free(counters)
                raise MemoryError("endpoints")
            self.endpoints[i].pulled = counters
            self.endpoints[i].pushed = counters + 1
            self.endpoints[i].pull = _pull_nothing
            self.endpoints[i].push = _push_away
            self.endpoints[i].release = _release_nothing
            self.endpoints[i].flush = _flush_nothing
            self.endpoints[i].room = _room_for_all
            self.endpoints[i].arm = _arm_nothing
            self.endpoints[i].attach = _attach_nothing
        return 0

    cdef int adopt(self, int index, object mailbox) except -1:
        """Note that endpoint `index` belongs to the worker of `mailbox` from here on (None: to nobody).

        Called while no worker uses the endpoint; subclasses hand it on to what they own.
        """
        self.mailboxes[index] = mailbox
        return 0

    def __dealloc__(self):
        cdef int i
        if self.endpoints != NULL:
            for i in range(self.endpoint_count):
                if self.endpoints[i] != NULL:
                    free(self.endpoints[i].pulled)
                    free(self.endpoints[i])
            free(self.endpoints)

    def snapshot(self):
        """Counters since start.

        Returns
        -------
        dict
            ``{to: {"packets", "bytes", "dropped"}, from: {...}}`` under the names of `directions`.
        """
        return {self.directions[0]: self._sum(True), self.directions[1]: self._sum(False)}

    def endpoint_snapshot(self, int index):
        """The same for one endpoint (queue pair)."""
        if not 0 <= index < self.endpoint_count:
            raise IndexError(f"{self.name}: endpoint {index} of {self.endpoint_count}")
        cdef endpoint_t* endpoint = self.endpoints[index]
        return {self.directions[0]: counters_snapshot(endpoint.pushed),
                self.directions[1]: counters_snapshot(endpoint.pulled)}

    def _sum(self, bint pushed):
        cdef int i, cause
        cdef counters_t total
        cdef counters_t* part
        memset(&total, 0, sizeof(total))
        for i in range(self.endpoint_count):
            part = self.endpoints[i].pushed if pushed else self.endpoints[i].pulled
            total.packets += part.packets
            total.bytes += part.bytes
            for cause in range(DROP_CAUSES):
                total.dropped[cause] += part.dropped[cause]
        return counters_snapshot(&total)

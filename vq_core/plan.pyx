"""Plans, made of what Python says of flows."""
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free
from vq_core.flow cimport SUB_BURST, flow_t
from vq_core.port cimport BURST_MAX, Port, burst_t, endpoint_t
from vq_core.program cimport Program, bind
from vq_core.switch cimport SwitchLane


cdef class Plan:
    """All flows of one worker, immutable.

    Parameters
    ----------
    flows : sequence of (source, source_index, target, target_index[, program, number])
        `source` is a Port; `target` a Port, or a SwitchLane and then `target_index` is the index of the source's
        port in the switch. Indices are endpoints (queue pairs). `program` is a Program or None, `number` that of the
        source among the ports of the group, 0 or 1, by which a program names ports.
    sub_burst : int
        Packets published at once where both ends are rings of guests, 1 to 32. Less than 32 end early once they
        have sub_burst * 704 bytes together.

    Raises
    ------
    ValueError
        `sub_burst` is out of range, or a program has no function.
    """

    def __cinit__(self, flows=(), *, int sub_burst=SUB_BURST):
        cdef int i = 0
        cdef flow_t* flow
        cdef Port source, target
        cdef SwitchLane lane
        cdef Program program
        if not 1 <= sub_burst <= BURST_MAX:
            raise ValueError(f"sub_burst {sub_burst} is not from 1 to {BURST_MAX} packets")
        lanes = set()
        flows = list(flows)
        self.keep = []
        self._owned = {}
        self.plan.flows = <flow_t*>calloc(len(flows) + 1, sizeof(flow_t))
        if self.plan.flows == NULL:
            raise MemoryError("plan")
        for source, source_index, target_object, target_index, *more in flows:
            flow = &self.plan.flows[i]
            flow.source = self._endpoint(source, source_index)
            flow.held_at = -1
            flow.step = BURST_MAX
            if isinstance(target_object, SwitchLane):
                lane = target_object
                flow.via = &lane.switch.table
                flow.lane = &lane.lane
                flow.source_port = target_index
                if lane not in lanes:            # most flows share one lane, which may have hundreds of members
                    lanes.add(lane)
                    self.keep.append(lane)
                    for member in lane.members:
                        if member is not None:
                            self._own(member[0], member[1])
            else:
                target = target_object
                flow.target = self._endpoint(target, target_index)
                self._own(target, target_index)
                if not flow.source.holds and not flow.target.holds:
                    flow.step = sub_burst
                    flow.patient = True
                    flow.need = 1
                if flow.source.holds:
                    flow.held = <burst_t*>calloc(1, sizeof(burst_t))
                    if flow.held == NULL:
                        raise MemoryError("plan")
            self._own(source, source_index)
            if more and more[0] is not None:
                program = bind(<Program?>more[0])
                self.keep.append(program)
                flow.program = &program.program
                if flow.target != NULL:
                    flow.ways[1 if more[1] else 0] = flow.source
                    flow.ways[0 if more[1] else 1] = flow.target if flow.target != flow.source else NULL
            i += 1
            self.plan.flow_count = i
        self.plan.endpoints = <endpoint_t**>calloc(len(self._owned) + 1, sizeof(endpoint_t*))
        if self.plan.endpoints == NULL:
            raise MemoryError("plan")
        for source, source_index in self._owned.values():
            self.plan.endpoints[self.plan.endpoint_count] = self._endpoint(source, source_index)
            self.plan.endpoint_count += 1

    @property
    def owned(self):
        """list of (Port, int): each endpoint of the plan, once."""
        return list(self._owned.values())

    cdef endpoint_t* _endpoint(self, Port port, int index) except NULL:
        if not 0 <= index < port.endpoint_count:
            raise IndexError(f"{port.name}: endpoint {index} of {port.endpoint_count}")
        return port.endpoints[index]

    cdef int _own(self, Port port, int index) except -1:
        self._owned[<uintptr_t>self._endpoint(port, index)] = (port, index)
        return 0

    cdef bint _holds(self) noexcept:
        cdef int i
        for i in range(self.plan.flow_count):
            if self.plan.flows[i].held != NULL:
                return True
        return False

    cdef int _find_heirs(self, Plan old, int* heirs) except -1:
        """Which flow of this plan is the same as each of the old one; -1: none."""
        cdef int i
        cdef flow_t* flow
        flows = {}
        for i in range(self.plan.flow_count):
            flow = &self.plan.flows[i]
            flows[<uintptr_t>flow.source, <uintptr_t>flow.target] = i
        for i in range(old.plan.flow_count):
            flow = &old.plan.flows[i]
            heirs[i] = flows.get((<uintptr_t>flow.source, <uintptr_t>flow.target), -1)
        return 0

    def __dealloc__(self):
        cdef int i
        if self.plan.flows != NULL:
            for i in range(self.plan.flow_count):
                free(self.plan.flows[i].held)
        free(self.plan.flows)
        free(self.plan.endpoints)

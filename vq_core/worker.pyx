"""The worker loop; the only place that gives up the GIL for long."""
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from vq_core.arch cimport vq_cycles, vq_fence, vq_load_u32, vq_pause, vq_store_release_u32
from vq_core.counters cimport DROP_NO_DESCRIPTORS, DROP_PROGRAM, counters_round
from vq_core.epoll cimport EPOLL_CLOEXEC, EPOLLIN, epoll_create1, epoll_event, epoll_move, epoll_wait
from vq_core.handover cimport Mailbox, handover_run, mailbox_poll, mailbox_t
from vq_core.offload cimport Offload, offload_push
from vq_core.port cimport ARM_PULL, ARM_PUSH, BURST_MAX, OFFLOAD_CSUM, ROOM_PAUSES, Port, burst_t, endpoint_t, packet_t
from vq_core.program cimport VERDICT_PASS, VERDICT_REFLECT, Program
from vq_core.switch cimport SwitchLane, switch_forward, switch_now_s

import os

cdef enum:
    IDLE_ROUNDS = 64             # empty rounds before the clock decides about sleeping
    IDLE_CYCLES = 150000         # about 50 microseconds: longer than a busy peer's gaps


# ---- one flow ----

cdef inline int _push(worker_t* worker, endpoint_t* target, packet_t* packets, int count,
                      uint32_t wants) noexcept nogil:
    if wants & ~target.accepts:
        return offload_push(worker.offload, target, packets, count)
    return target.push(target, packets, count)


cdef inline int _part(flow_t* flow, packet_t* packets, int left) noexcept nogil:
    """How many of the `left` packets to publish at once: a sub-burst, or less of it when they are long."""
    cdef int i, most = min(flow.step, left)
    cdef int64_t bytes_left = <int64_t>flow.step * SUB_BURST_BYTES
    if flow.step == BURST_MAX:
        return left
    for i in range(most):
        bytes_left -= packets[i].length
        if bytes_left <= 0:
            return i + 1
    return most


cdef inline int _deliver(worker_t* worker, flow_t* flow, burst_t* burst, int first) noexcept nogil:
    """Push and release packets `first` and up; where it stopped for want of room (burst.count: all done)."""
    cdef endpoint_t* source = flow.source
    cdef int count = burst.count, size, done
    while first < count:
        size = _part(flow, &burst.packets[first], count - first)
        done = _push(worker, flow.target, &burst.packets[first], size, burst.wants)
        first += done
        if done < size:
            if flow.held != NULL:
                break
            flow.target.pushed.dropped[DROP_NO_DESCRIPTORS] += count - first
            first = count
        source.release(source, burst, first)
    return first


# ---- with a program ----

cdef bint _judge(flow_t* flow, burst_t* burst) noexcept nogil:
    """Ask the program; whether some packet does not simply pass."""
    memset(flow.verdicts, 0, sizeof(flow.verdicts))
    return flow.program.run(flow.program.state, burst.packets, flow.verdicts, burst.count) != 0


cdef endpoint_t* _way(flow_t* flow, uint16_t verdict) noexcept nogil:
    """Where a verdict sends a packet; NULL: nowhere. Whatever the program wrote, it is one of our endpoints."""
    if verdict == VERDICT_PASS:
        return flow.target
    if verdict == VERDICT_REFLECT:
        return flow.source
    if flow.lane != NULL:
        return flow.lane.endpoints[verdict - 1] if verdict <= flow.lane.port_count else NULL
    return flow.ways[verdict - 1] if verdict <= 2 else NULL


cdef int _send(worker_t* worker, flow_t* flow, burst_t* burst, int first, int size) noexcept nogil:
    """Send packets of one verdict on their way, or drop them: how many are dealt with; fewer than `size`: no room."""
    cdef endpoint_t* way = _way(flow, flow.verdicts[first])
    cdef int done
    if way == NULL:
        flow.source.pulled.dropped[DROP_PROGRAM] += size
        return size
    done = _push(worker, way, &burst.packets[first], size, burst.wants)
    if done < size and not (way == flow.target and flow.held != NULL):
        way.pushed.dropped[DROP_NO_DESCRIPTORS] += size - done
        done = size
    if way != flow.target:
        way.flush(way)
    return done


cdef int _deliver_judged(worker_t* worker, flow_t* flow, burst_t* burst, int first) noexcept nogil:
    """As `_deliver`, in runs of packets with one verdict."""
    cdef int count = burst.count, end, size, done
    while first < count:
        end = first + 1
        while end < count and flow.verdicts[end] == flow.verdicts[first]:
            end += 1
        size = _part(flow, &burst.packets[first], end - first)
        done = _send(worker, flow, burst, first, size)
        first += done
        if done < size:
            break
        flow.source.release(flow.source, burst, first)
    return first


cdef void _forward_judged(worker_t* worker, flow_t* flow, burst_t* burst) noexcept nogil:
    """Leave to the switch what passes, and send the rest where the program wants it."""
    cdef burst_t* passed = &worker.passed
    cdef int i
    passed.count = passed.wants = 0
    for i in range(<int>burst.count):
        if flow.verdicts[i] == VERDICT_PASS:
            memcpy(&passed.packets[passed.count], &burst.packets[i], sizeof(packet_t))
            passed.count += 1
            passed.wants |= burst.packets[i].wants
        else:
            _send(worker, flow, burst, i, 1)
    if passed.count:
        switch_forward(flow.via, flow.lane, passed, flow.source_port, worker.offload, switch_now_s())


cdef inline int _patience(flow_t* flow, uint64_t now) noexcept nogil:
    """How many packets to pull from a ring towards a ring; 0: wait a moment, the target has no room."""
    cdef int room = flow.target.room(flow.target)
    cdef int need = flow.need
    if need > 1:
        flow.most = max(flow.most, room)
        need = max(1, min(need, flow.most // 2))
    if room < need:
        if flow.tired or (room < 0 and room != ROOM_PAUSES):
            return BURST_MAX
        if not flow.waiting:
            flow.waiting = True
            flow.waiting_since = now
        if now - flow.waiting_since < <uint64_t>(PAUSE_CYCLES if room == ROOM_PAUSES else PATIENCE_CYCLES):
            return 0
        flow.tired = True
        flow.waiting = False
        return BURST_MAX
    flow.tired = False
    flow.waiting = False
    if need == 1:
        return min(room, BURST_MAX)
    return max(1, min(room // need, BURST_MAX))


cdef int _run_flow(worker_t* worker, flow_t* flow, uint64_t now) noexcept nogil:
    """One round of a flow; number of packets that moved."""
    cdef endpoint_t* source = flow.source
    cdef endpoint_t* target = flow.target
    cdef burst_t* burst = &worker.burst
    cdef int count, first = 0, limit = BURST_MAX
    if flow.held != NULL:
        burst = flow.held
        if target != NULL:
            flow.room = target.room(target)
            limit = min(limit, flow.room)
            flow.waiting = limit <= 0
            if flow.waiting:
                return 0
    elif flow.patient:
        limit = _patience(flow, now)
        if limit == 0:
            return 0
    if flow.held_at >= 0:
        first = flow.held_at
    elif source.pull(source, burst, limit) == 0:
        source.pulled.empty_polls += 1
        return 0
    elif flow.program != NULL:
        flow.judged = _judge(flow, burst)
    if flow.patient:
        flow.need = NEED_MAX if burst.wants & ~<uint32_t>OFFLOAD_CSUM else 1
    count = burst.count - first
    if target == NULL:
        if flow.judged:
            _forward_judged(worker, flow, burst)
        else:
            switch_forward(flow.via, flow.lane, burst, flow.source_port, worker.offload, switch_now_s())
        source.release(source, burst, burst.count)
        source.flush(source)
        return count
    if flow.judged:
        first = _deliver_judged(worker, flow, burst, first)
    else:
        first = _deliver(worker, flow, burst, first)
    if first < <int>burst.count:
        count -= burst.count - first
        flow.held_at = first
        flow.waiting = True
    else:
        flow.held_at = -1
    target.flush(target)
    if source != target:
        source.flush(source)
    return count


cdef inline void _account(flow_t* flow, int moved, uint64_t cycles) noexcept nogil:
    """Note on both ends what a round of a flow moved and cost."""
    counters_round(flow.source.pulled, <uint32_t>moved, cycles)
    if flow.target != NULL:
        counters_round(flow.target.pushed, <uint32_t>moved, cycles)


# ---- the loop ----

cdef int _arm_all(plan_t* plan) noexcept nogil:
    """Ask for wake-ups; non-zero if something is to be done already."""
    cdef int i, work = 0
    cdef flow_t* flow
    for i in range(plan.flow_count):
        flow = &plan.flows[i]
        if flow.waiting and flow.held != NULL:
            work |= flow.target.arm(flow.target, ARM_PUSH)
            # Another flow may have looked into the ring since, and what it found there is no news to the target.
            work |= flow.target.room(flow.target) > flow.room
        elif flow.held_at < 0:
            # While packets of a patient flow wait this says that there is work: its patience ends by the clock.
            work |= flow.source.arm(flow.source, ARM_PULL)
    if not work:
        for i in range(plan.flow_count):
            plan.flows[i].waiting &= plan.flows[i].held != NULL
    return work


cdef void _sleep(worker_t* worker, mailbox_t* mailbox) noexcept nogil:
    cdef epoll_event events[16]
    cdef int i
    for i in range(worker.plan.endpoint_count):
        worker.plan.endpoints[i].flush(worker.plan.endpoints[i])
    if _arm_all(worker.plan):
        return
    # The mailbox's eventfd is watched too: a command that comes now ends the wait at once.
    if vq_load_u32(&mailbox.posted) != mailbox.done:
        return
    worker.sleeps += 1
    mailbox.asleep = 1
    epoll_wait(worker.epoll_fd, events, 16, -1)
    mailbox.asleep = 0


cdef void _loop(worker_t* worker, mailbox_t* mailbox) noexcept nogil:
    cdef int i, moved, work, empty = 0
    cdef uint64_t now, last = vq_cycles(), idle_since = last
    cdef plan_t* plan
    while True:
        mailbox_poll(mailbox)
        if worker.stopping:
            break
        plan = worker.plan
        work = 0
        for i in range(plan.flow_count):
            moved = _run_flow(worker, &plan.flows[i], last)
            if moved == 0:
                continue
            work += moved
            now = vq_cycles()
            _account(&plan.flows[i], moved, now - last)
            worker.busy_cycles += now - last
            last = now
        mailbox.rounds += 1
        if work:
            empty = 0
        else:
            now = vq_cycles()
            worker.idle_cycles += now - last
            worker.empty_rounds += 1
            if empty == 0:
                idle_since = now
            empty += 1
            vq_pause()
            if empty > IDLE_ROUNDS and not worker.busy and now - idle_since > IDLE_CYCLES:
                _sleep(worker, mailbox)
                now = vq_cycles()
                empty = 0
            last = now


# ---- changes, run at a burst boundary ----

cdef struct plan_change_t:
    # What the control thread has found out beforehand, so that the worker is held up by what changes alone.
    plan_t* plan
    endpoint_t** leaving         # endpoints that the new plan has not
    int leaving_count
    endpoint_t** coming          # and those that the old one had not
    int coming_count
    int* heirs                   # by flow of the old plan: the same flow of the new one, or -1; NULL: no flow holds


cdef void _keep_held(plan_t* old, plan_t* new, int* heirs) noexcept nogil:
    """Hand packets that wait for room over to the same flow of the new plan; release the others."""
    cdef int i
    cdef flow_t* flow
    cdef flow_t* heir
    for i in range(old.flow_count):
        flow = &old.flows[i]
        if flow.held_at < 0:
            continue
        if heirs[i] >= 0:
            heir = &new.flows[heirs[i]]
            heir.held, flow.held = flow.held, heir.held
            heir.held_at = flow.held_at
            heir.judged = flow.judged
            memcpy(heir.verdicts, flow.verdicts, sizeof(flow.verdicts))
            heir.waiting = True
        else:
            flow.target.pushed.dropped[DROP_NO_DESCRIPTORS] += flow.held.count - flow.held_at
            flow.source.release(flow.source, flow.held, flow.held.count)
        flow.held_at = -1


cdef void _change_plan(void* target, void* argument) noexcept nogil:
    cdef worker_t* worker = <worker_t*>target
    cdef plan_change_t* change = <plan_change_t*>argument
    cdef int i
    if change.heirs != NULL:
        _keep_held(worker.plan, change.plan, change.heirs)
    for i in range(change.leaving_count):
        change.leaving[i].attach(change.leaving[i], -1)
    for i in range(change.coming_count):
        change.coming[i].attach(change.coming[i], worker.epoll_fd)
    worker.plan = change.plan


cdef void _stop(void* target, void* argument) noexcept nogil:
    (<worker_t*>target).stopping = True


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
        `sub_burst` is out of range.
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
                program = (<Program?>more[0]).bound()
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


cdef endpoint_t** _endpoints(list owned, int* count) except NULL:
    """An array of endpoints, to be freed by the caller."""
    cdef endpoint_t** found = <endpoint_t**>calloc(len(owned) + 1, sizeof(endpoint_t*))
    if found == NULL:
        raise MemoryError("plan")
    for port, index in owned:
        found[count[0]] = (<Port>port).endpoints[<int>index]
        count[0] += 1
    return found


cdef class Worker:
    """A thread's work: call `run` in a thread of its own, and change what it does from the control thread.

    Parameters
    ----------
    cpu : int, optional
        The processor to stay on; None leaves it to the kernel.
    poll : {"adaptive", "busy"}
        Sleep when there is nothing to do, or never.

    Notes
    -----
    Threading: `run` blocks without the GIL until `stop`. All else is for the control thread.
    """

    def __cinit__(self, cpu=None, poll="adaptive"):
        if poll not in ("adaptive", "busy"):
            raise ValueError(f"poll is {poll!r}; adaptive and busy are possible")
        self.worker = <worker_t*>calloc(1, sizeof(worker_t))
        if self.worker == NULL:
            raise MemoryError("worker")
        self.worker.epoll_fd = -1
        self.mailbox = Mailbox()
        self.cpu = cpu
        self._plan = Plan()
        self._offload = Offload()
        self.worker.plan = &self._plan.plan
        self.worker.offload = &self._offload.work
        self.worker.busy = poll == "busy"
        self.worker.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.worker.epoll_fd < 0 or epoll_move(-1, self.worker.epoll_fd, self.mailbox.box.event_fd, EPOLLIN):
            PyErr_SetFromErrno(OSError)
        self.mailbox.box.epoll_fd = self.worker.epoll_fd

    def __dealloc__(self):
        if self.worker != NULL:
            if self.worker.epoll_fd >= 0:
                os.close(self.worker.epoll_fd)
            free(self.worker)

    def close(self):
        """Close the worker's descriptors, after `run` has returned and its plan is empty; may be called twice."""
        if vq_load_u32(&self.mailbox.box.running):
            raise ValueError("the worker runs; stop it first")
        if self._plan._owned:
            raise ValueError("the worker still has flows; set an empty plan first")
        self.mailbox.box.epoll_fd = -1
        self.mailbox.close()
        if self.worker.epoll_fd >= 0:
            os.close(self.worker.epoll_fd)
            self.worker.epoll_fd = -1

    def run(self):
        """Move packets until `stop`; for a thread of its own, which is bound to `cpu`."""
        if self.cpu is not None:
            os.sched_setaffinity(0, {self.cpu})
        with nogil:
            vq_store_release_u32(&self.mailbox.box.running, 1)
            vq_fence()           # pairs with the fence in handover_run
            _loop(self.worker, &self.mailbox.box)
            # From here on posters drain the mailbox themselves.
            vq_store_release_u32(&self.mailbox.box.running, 0)

    def stop(self):
        """End `run` at its next burst boundary."""
        handover_run(self.mailbox, _stop, self.worker, NULL)

    def set_plan(self, Plan plan not None):
        """Swap the flows; when this returns, endpoints that are in the old plan alone are nobody's.

        An endpoint that another worker has must be taken out of that worker's plan first.
        """
        cdef Plan old = self._plan
        cdef plan_change_t change
        coming = [plan._owned[key] for key in plan._owned.keys() - old._owned.keys()]
        leaving = [old._owned[key] for key in old._owned.keys() - plan._owned.keys()]
        for port, index in coming:
            owner = (<Port>port).mailboxes[index]
            if owner is not None and owner is not self.mailbox:
                raise ValueError(f"{port.name}: endpoint {index} belongs to another worker")
        memset(&change, 0, sizeof(change))
        change.plan = &plan.plan
        try:
            change.coming = _endpoints(coming, &change.coming_count)
            change.leaving = _endpoints(leaving, &change.leaving_count)
            if old._holds():
                change.heirs = <int*>calloc(old.plan.flow_count, sizeof(int))
                if change.heirs == NULL:
                    raise MemoryError("plan")
                plan._find_heirs(old, change.heirs)
            handover_run(self.mailbox, _change_plan, self.worker, &change)
        finally:
            free(change.coming)
            free(change.leaving)
            free(change.heirs)
        self._plan = plan
        for port, index in coming:
            (<Port>port).adopt(index, self.mailbox)
        for port, index in leaving:
            (<Port>port).adopt(index, None)

    def snapshot(self):
        """dict: cpu, rounds, empty_rounds, busy_cycles, idle_cycles, sleeps since the start."""
        return {"cpu": self.cpu, "rounds": self.mailbox.box.rounds, "empty_rounds": self.worker.empty_rounds,
                "busy_cycles": self.worker.busy_cycles, "idle_cycles": self.worker.idle_cycles,
                "sleeps": self.worker.sleeps}

"""The worker loop; the only place that gives up the GIL for long."""
from cpython.exc cimport PyErr_SetFromErrno
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from vq_core.arch cimport vq_cycles, vq_fence, vq_load_u32, vq_pause, vq_store_release_u32
from vq_core.counters cimport DROP_NO_DESCRIPTORS
from vq_core.epoll cimport EPOLL_CLOEXEC, EPOLLIN, epoll_create1, epoll_event, epoll_move, epoll_wait
from vq_core.flow cimport flow_t
from vq_core.flow_round cimport flow_account, flow_round
from vq_core.handover cimport Mailbox, handover_run, mailbox_poll, mailbox_t
from vq_core.offload cimport Offload
from vq_core.plan cimport Plan, plan_t
from vq_core.port cimport ARM_PULL, ARM_PUSH, Port, endpoint_t

import os

cdef enum:
    IDLE_ROUNDS = 64             # empty rounds before the clock decides about sleeping
    IDLE_CYCLES = 150000         # about 50 microseconds: longer than a busy peer's gaps


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
            moved = flow_round(&worker.scratch, &plan.flows[i], last)
            if moved == 0:
                continue
            work += moved
            now = vq_cycles()
            flow_account(&plan.flows[i], moved, now - last)
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
        self.worker.scratch.offload = &self._offload.work
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
        if self.mailbox.thread:
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
        if self.mailbox.thread:
            raise ValueError("the worker runs already, in another thread")
        # Before the GIL is given up: from here on `close` refuses.
        self.mailbox.thread = PyThread_get_thread_ident()
        try:
            if self.cpu is not None:
                os.sched_setaffinity(0, {self.cpu})
            with nogil:
                vq_store_release_u32(&self.mailbox.box.running, 1)
                vq_fence()           # pairs with the fence in handover_run
                _loop(self.worker, &self.mailbox.box)
                # From here on posters drain the mailbox themselves.
                vq_store_release_u32(&self.mailbox.box.running, 0)
        finally:
            self.mailbox.thread = 0

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

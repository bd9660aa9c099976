"""What a queue that the control thread serves waits for, shows and asks."""
from cpython.exc cimport PyErr_SetFromErrno
from vq_core.epoll cimport EPOLL_CLOEXEC, EPOLLIN, epoll_create1, epoll_event, epoll_move, epoll_wait
from vq_core.queue cimport Queue
from vq_core.queue_state cimport queue_flush, queue_lost, queue_publish, queue_request_kick, queue_t
from vq_core.ring cimport ring_has_more, ring_known, ring_next_used, ring_shadow_used
from vq_core.timer import Timer

import os

POLL_S = 0.01                    # between two looks at a ring whose driver does not kick


cdef class ServedQueue:
    """Base of what serves a virtqueue in the control thread, one chain at a time.

    Parameters
    ----------
    queue : Queue
        A queue that no worker owns.
    limit : int
        For the subclasses: how much of a chain they look at.

    Notes
    -----
    Threading: the control thread. Once `fileno()` is readable, and after messages that may have started or enabled the
    ring: `begin`, take chains until enough, `publish`, `arm`.
    """

    def __cinit__(self, Queue queue not None, limit=None):
        self._epoll_fd = -1
        self.queue = queue
        if queue.mailbox is not None or queue.queue.started:
            raise ValueError(f"queue {queue.index} belongs to a worker or is started")
        self._timer = Timer()
        self._epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll_fd < 0 or epoll_move(-1, self._epoll_fd, self._timer.fileno(), EPOLLIN):
            PyErr_SetFromErrno(OSError)
        queue.queue.epoll_fd = self._epoll_fd

    def __dealloc__(self):
        if self._epoll_fd > 0:       # 0: the arguments were refused, and nothing was opened
            os.close(self._epoll_fd)

    def fileno(self):
        """int: the descriptor to wait for."""
        return self._epoll_fd

    def close(self):
        """Close the descriptors, after the ring was stopped; may be called twice."""
        if self.queue.queue.started:
            raise ValueError(f"queue {self.queue.index} is started; stop it first")
        self.queue.queue.epoll_fd = -1
        self._timer.close()
        if self._epoll_fd >= 0:
            os.close(self._epoll_fd)
            self._epoll_fd = -1

    def begin(self):
        """Take note of what has woken the event loop."""
        cdef epoll_event events[4]
        # Edge-triggered: looking makes the edges go away, and nothing has to be read.
        epoll_wait(self._epoll_fd, events, 4, 0)

    def begun(self):
        """bool: whether the ring was started at its very beginning since the last call, as a new driver has it."""
        cdef queue_t* queue = &self.queue.queue
        if not queue.started or self._begun == queue.lives:
            return False
        self._begun = queue.lives
        return bool(self.queue._fresh)

    def publish(self):
        """Show the driver what was answered, and call it if it wants that."""
        cdef queue_t* queue = &self.queue.queue
        cdef bint packed = queue.ring.is_packed
        if queue.started and ring_next_used(&queue.ring, packed) != ring_shadow_used(&queue.ring, packed):
            queue_publish(queue, packed, ring_next_used(&queue.ring, packed))
            queue_flush(queue)

    def arm(self, double pause=0):
        """Ask for a kick; `fileno()` becomes readable by itself for what is there already, or may come without one.

        Parameters
        ----------
        pause : float
            Seconds until then when there is more to pop already.
        """
        cdef queue_t* queue = &self.queue.queue
        cdef bint packed = queue.ring.is_packed
        if not queue.live or self._outstanding >= queue.ring.num:
            return
        if ring_known(&queue.ring, packed) > 0:
            self._timer.set(pause)
            return
        queue_request_kick(queue)
        # Also for an impossible index, or when memory was lost: the next `pop` breaks the ring.
        if ring_has_more(&queue.ring, packed) or queue_lost(queue):
            self._timer.set(pause)
        elif queue.kick_fd < 0:
            self._timer.set(POLL_S)

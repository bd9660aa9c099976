"""One cache line thrown to and fro between two threads: how far apart two processors are at the moment.

Whatever shares a ring depends on it, and on a virtual machine it changes while one measures.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t
from vq_core.arch cimport vq_load_acquire_u32, vq_pause, vq_store_release_u32
from vq_core.clock cimport CLOCK_MONOTONIC, clock_now

cdef struct ball_t:
    uint8_t before[128]              # a line of its own, and the next one, which prefetchers fetch along
    uint32_t count                   # odd: the catcher's turn
    uint8_t after[128]


cdef int64_t ball_throw(ball_t* ball, uint32_t first, uint32_t rounds) noexcept nogil:
    """Play so many rounds, beginning with number `first`; nanoseconds."""
    cdef int64_t begin = clock_now(CLOCK_MONOTONIC)
    cdef uint32_t i
    for i in range(first, first + rounds):
        vq_store_release_u32(&ball.count, 2 * i + 1)
        while vq_load_acquire_u32(&ball.count) != 2 * i + 2:
            vq_pause()
    return clock_now(CLOCK_MONOTONIC) - begin


cdef void ball_return(ball_t* ball, uint32_t first, uint32_t rounds) noexcept nogil:
    """The other side of `ball_throw`."""
    cdef uint32_t i
    for i in range(first, first + rounds):
        while vq_load_acquire_u32(&ball.count) != 2 * i + 1:
            vq_pause()
        vq_store_release_u32(&ball.count, 2 * i + 2)


cdef class PingPong:
    """A ball for two threads, each of which has bound itself to a processor.

    Parameters
    ----------
    rounds : int
        Rounds of one sample, 1 to 1000000.
    samples : int
        1 to 1000.

    Notes
    -----
    Threading: one thread calls `throw` while another one is in, or on its way to, `catch`; both give up the GIL and
    wait busily for each other.
    """

    cdef ball_t ball
    cdef uint32_t rounds
    cdef uint32_t samples

    def __cinit__(self, rounds=4000, samples=25):
        if not 1 <= rounds <= 1_000_000 or not 1 <= samples <= 1000:
            raise ValueError(f"{rounds} rounds in {samples} samples; 1 to 1000000 and 1 to 1000 are possible")
        self.ball.count = 0
        self.rounds = rounds
        self.samples = samples

    def throw(self):
        """Play, and time it.

        Returns
        -------
        list of float
            Nanoseconds a round trip, one figure a sample.
        """
        cdef uint32_t i
        cdef int64_t spent
        found = []
        for i in range(self.samples):
            with nogil:
                spent = ball_throw(&self.ball, i * self.rounds, self.rounds)
            found.append(spent / <double>self.rounds)
        self.ball.count = 0
        return found

    def catch(self):
        """Play along."""
        with nogil:
            ball_return(&self.ball, 0, self.rounds * self.samples)

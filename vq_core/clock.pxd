"""Time for the data plane: the kernel's clocks without a system call, and timers that wake a worker."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    cdef struct itimerspec:
        timespec it_interval
        timespec it_value
    int c_clock_gettime "clock_gettime"(int clock, timespec* now) noexcept
    int CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_THREAD_CPUTIME_ID

cdef extern from "<sys/timerfd.h>" nogil:
    int c_timerfd_create "timerfd_create"(int clock, int flags) noexcept
    int c_timerfd_settime "timerfd_settime"(int fd, int flags, const itimerspec* wanted, itimerspec* before) noexcept
    int TFD_NONBLOCK, TFD_CLOEXEC, TFD_TIMER_ABSTIME

cdef enum:
    SECOND_NS = 1000000000

cdef inline int64_t clock_now(int clock) noexcept nogil:
    """The time of a clock in nanoseconds; about 25 ns, since the kernel shares the page it is in."""
    cdef timespec now
    c_clock_gettime(clock, &now)
    return now.tv_sec * <int64_t>SECOND_NS + now.tv_nsec

cdef inline int clock_timer() noexcept nogil:
    """A timer on CLOCK_MONOTONIC: its descriptor, or -1 with errno."""
    return c_timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)

cdef inline void clock_wake_at(int timer_fd, int64_t when_ns) noexcept nogil:
    """Make the timer expire at a time of CLOCK_MONOTONIC (> 0). It is never read: each expiry is an edge of its own."""
    cdef itimerspec wanted
    memset(&wanted, 0, sizeof(wanted))
    wanted.it_value.tv_sec = when_ns // SECOND_NS
    wanted.it_value.tv_nsec = when_ns % SECOND_NS
    c_timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &wanted, NULL)

"""What the engine was compiled by and with: belongs to each measured figure."""
cdef extern from *:
    """
    #ifndef VQ_BUILD_FLAGS
    #define VQ_BUILD_FLAGS ""
    #endif
    #if defined(__clang__)
    #define VQ_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define VQ_COMPILER "gcc " __VERSION__
    #else
    #define VQ_COMPILER "unknown"
    #endif
    #if defined(__AVX512F__)
    #define VQ_BASELINE "AVX-512"
    #elif defined(__AVX2__)
    #define VQ_BASELINE "AVX2"
    #elif defined(__x86_64__)
    #define VQ_BASELINE "x86-64"
    #elif defined(__aarch64__)
    #define VQ_BASELINE "aarch64"
    #else
    #define VQ_BASELINE "unknown"
    #endif
    #ifdef __OPTIMIZE__
    #define VQ_OPTIMIZED 1
    #else
    #define VQ_OPTIMIZED 0
    #endif
    """
    const char* VQ_BUILD_FLAGS
    const char* VQ_COMPILER
    const char* VQ_BASELINE
    bint VQ_OPTIMIZED


def compiled():
    """What this extension was built with; all extensions of the engine are built alike.

    Returns
    -------
    dict
        compiler: its name and version. flags: as given on its command line; empty if the build did not say them.
        baseline: the instruction set that it might use everywhere. optimized: whether it optimized at all.
    """
    return {"compiler": VQ_COMPILER.decode(), "flags": VQ_BUILD_FLAGS.decode(), "baseline": VQ_BASELINE.decode(),
            "optimized": bool(VQ_OPTIMIZED)}

/* Programs between the ports of a pump: what a function sees and says, for C, cffi, ctypes and numba.
 *
 *     uint32_t program(void *state, const vq_packet_t *packets, uint16_t *verdicts, uint32_t count);
 *
 * Called in a worker thread with up to 32 packets of one source, as they lie in its memory. `verdicts` is all
 * VQ_VERDICT_PASS; what shall not pass is written there. Returns 0 if all pass, anything else if verdicts were written.
 * The structures are read-only; the bytes behind them may be changed, but a guest can see them, and change them, too:
 * read what decides something once. Packets must not be kept beyond the call.
 */
#ifndef VQ_PROGRAM_H
#define VQ_PROGRAM_H

#include <stdint.h>

#define VQ_PROGRAM_ABI 1

enum {
    VQ_VERDICT_PASS = 0,         /* to where the packet was going */
    VQ_VERDICT_REFLECT = 0xfffe, /* back to where it came from */
    VQ_VERDICT_DROP = 0xffff     /* nowhere; any other number n: to port n - 1 of the group, dropped if there is none */
};

typedef struct {
    uint8_t *data;
    uint32_t length;
} vq_segment_t;

typedef struct {
    uint8_t *data;         /* first byte of the Ethernet header */
    vq_segment_t *more;    /* the segments after the first */
    uint32_t head_bytes;   /* bytes at `data` */
    uint32_t length;       /* bytes in all */
    uint32_t more_count;
    uint16_t wants;        /* bits of work left to do: checksum, segmentation */
    uint16_t mark;         /* the source's own */
    uint8_t header[12];    /* virtio-net header */
} vq_packet_t;

typedef uint32_t vq_program_t(void *state, const vq_packet_t *packets, uint16_t *verdicts, uint32_t count);

#endif

/* Streams of a guest's sockets, for the test of the socket device.
 *
 *     vsock_tool call CID PORT BYTES    connect, send numbers, shut down, read numbers until the end, and check them
 *     vsock_tool serve PORT BYTES       the same for one who calls
 *
 * Both ways go at the same time; what one side sends is a sequence that the other one knows.
 */
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static uint8_t value(uint64_t place, int ours)
{
    return (uint8_t)(place * 31 + (place >> 8) + (place >> 16) + ours);
}

static int exchange(int fd, uint64_t bytes)
{
    uint64_t sent = 0, read_ = 0;
    uint8_t out[5000], in[7000];
    int ended = 0;

    while (!ended || sent < bytes) {
        struct pollfd event = {fd, (short)(POLLIN * !ended | (sent < bytes ? POLLOUT : 0)), 0};
        poll(&event, 1, -1);
        if (event.revents & POLLOUT) {
            size_t size = bytes - sent < sizeof(out) ? bytes - sent : sizeof(out);
            for (size_t i = 0; i < size; i++)
                out[i] = value(sent + i, 1);
            ssize_t done = send(fd, out, size, MSG_DONTWAIT);
            if (done > 0)
                sent += done;
            if (sent == bytes && shutdown(fd, SHUT_WR))
                return perror("shutdown"), 1;
        }
        if (event.revents & (POLLIN | POLLHUP | POLLERR) && !ended) {
            ssize_t done = recv(fd, in, sizeof(in), 0);
            if (done < 0)
                return perror("recv"), 1;
            ended = done == 0;
            for (ssize_t i = 0; i < done; i++)
                if (in[i] != value(read_ + i, 0))
                    return printf("byte %llu is wrong\n", (unsigned long long)(read_ + i)), 1;
            read_ += done;
        }
    }
    printf("sent %llu read %llu\n", (unsigned long long)sent, (unsigned long long)read_);
    return 0;
}

int main(int count, char **words)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0), one;

    if (fd < 0)
        return perror("socket"), 1;
    if (count == 5 && !strcmp(words[1], "call")) {
        address.svm_cid = atoi(words[2]);
        address.svm_port = atoi(words[3]);
        if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
            return perror("connect"), 2;
        return exchange(fd, strtoull(words[4], NULL, 0));
    }
    if (count != 4)
        return 3;
    address.svm_cid = VMADDR_CID_ANY;
    address.svm_port = atoi(words[2]);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 4))
        return perror("listen"), 1;
    one = accept(fd, NULL, NULL);
    return one < 0 ? (perror("accept"), 1) : exchange(one, strtoull(words[3], NULL, 0));
}

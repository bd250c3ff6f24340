// Load for a TCP port and the server behind it; one thread, one epoll, as little work of its own as the kernel allows.
//
//   load server PORT                                      echoes, swallows or pours, as each connection's first 16 bytes ask
//   load up|down ADDRESS PORT CONNECTIONS SECONDS         bulk; an upload counts only when the server has confirmed its bytes
//   load ping ADDRESS PORT CONNECTIONS BYTES SECONDS      one request at a time on each connection
//   load short ADDRESS PORT PARALLEL BYTES SECONDS        connect, one request, its answer, close; again
//   load idle ADDRESS PORT CONNECTIONS                    opens them, says `ready`, holds them until standard input ends; then
//                                                         each must echo one more byte, or it counts as an error and the exit code is 1
//
// A client prints one JSON object. "errors" counts what went wrong; the text for people is on standard error.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 256, POUR = 512 << 10, SWALLOW = 4 << 20, TURNS = 16, LARGEST = 64 << 10, STALL_SECONDS = 5, GRACE_SECONDS = 20 };
static const off_t SOURCE_BYTES = 4 << 20;
static const double WARM_UP_SECONDS = 0.15;  // of a ping: slow start and first touches do not count

typedef struct {
    char mode;  // 'E'cho, 'U'pload, 'D'ownload
    char padding[3];
    uint32_t milliseconds;  // of a download
    uint64_t unused;
} Header;

typedef struct {
    int fd, state, header_bytes, ended;
    Header header;
    uint64_t count;      // bytes swallowed
    int count_bytes;     // of the server's confirmation
    off_t offset;        // in the source of an upload or download
    double began;
    char *unsent;        // of an echo that did not fit the socket's buffer
    size_t unsent_bytes, unsent_at;
    int got;
} Connection;

static char buffer[1 << 18];
static int poller, source = -1;
static struct sockaddr_in target;
static uint64_t errors;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double cpu_seconds(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

static void make_source(void) {
    source = memfd_create("source", 0);
    if (source < 0 || ftruncate(source, SOURCE_BYTES))
        fail("memfd");
    for (size_t at = 0; at < sizeof buffer; at++)
        buffer[at] = (char)((at * 2654435761u) >> 13);
    for (off_t at = 0; at < SOURCE_BYTES; at += (off_t)sizeof buffer)
        if (pwrite(source, buffer, sizeof buffer, at) != (ssize_t)sizeof buffer)
            fail("pwrite");
}

static void at_once(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static void watch(int how, Connection *connection, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(poller, how, connection->fd, &event))
        fail("epoll_ctl");
}

// As much as the socket takes; -1: it is broken.
static ssize_t pour(Connection *connection) {
    off_t at = connection->offset;
    size_t left = SOURCE_BYTES - at > POUR ? POUR : (size_t)(SOURCE_BYTES - at);
    ssize_t sent = sendfile(connection->fd, source, &at, left);
    if (sent > 0)
        connection->offset = (connection->offset + sent) % SOURCE_BYTES;
    return sent < 0 && errno == EAGAIN ? 0 : sent;
}

// ---- server

static void drop(Connection *connection) {
    close(connection->fd);
    free(connection->unsent);
    free(connection);
}

static void accept_all(int listener) {
    for (int turn = 0; turn < 64; turn++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
        if (fd < 0)
            return;
        at_once(fd);
        Connection *connection = calloc(1, sizeof *connection);
        connection->fd = fd;
        watch(EPOLL_CTL_ADD, connection, EPOLLIN);
    }
}

static int read_header(Connection *connection) {
    ssize_t got = recv(connection->fd, (char *)&connection->header + connection->header_bytes,
                       sizeof connection->header - (size_t)connection->header_bytes, 0);
    if (got <= 0)
        return got < 0 && errno == EAGAIN;
    connection->header_bytes += (int)got;
    if (connection->header_bytes == sizeof connection->header && connection->header.mode == 'D') {
        connection->began = now();
        watch(EPOLL_CTL_MOD, connection, EPOLLOUT);
    }
    return 1;
}

static int echo(Connection *connection) {
    if (connection->unsent_at < connection->unsent_bytes) {
        ssize_t sent = send(connection->fd, connection->unsent + connection->unsent_at, connection->unsent_bytes - connection->unsent_at, 0);
        if (sent < 0)
            return errno == EAGAIN;
        connection->unsent_at += (size_t)sent;
        if (connection->unsent_at == connection->unsent_bytes)
            watch(EPOLL_CTL_MOD, connection, EPOLLIN);
        return 1;
    }
    ssize_t got = recv(connection->fd, buffer, LARGEST, 0);
    if (got <= 0)
        return got < 0 && errno == EAGAIN;
    ssize_t sent = send(connection->fd, buffer, (size_t)got, 0);
    if (sent < 0 && errno != EAGAIN)
        return 0;
    if (sent < 0)
        sent = 0;
    if (sent < got) {
        connection->unsent_bytes = (size_t)(got - sent);
        connection->unsent_at = 0;
        connection->unsent = realloc(connection->unsent, connection->unsent_bytes);
        memcpy(connection->unsent, buffer + sent, connection->unsent_bytes);
        watch(EPOLL_CTL_MOD, connection, EPOLLOUT);
    }
    return 1;
}

static int swallow(Connection *connection) {
    for (int turn = 0; turn < TURNS; turn++) {
        ssize_t got = recv(connection->fd, buffer, SWALLOW, MSG_TRUNC);  // on TCP: counts and copies nothing
        if (got < 0)
            return errno == EAGAIN;
        if (got == 0) {
            if (send(connection->fd, &connection->count, sizeof connection->count, 0) != sizeof connection->count)
                perror("confirmation");
            return 0;
        }
        connection->count += (uint64_t)got;
    }
    return 1;
}

static int give(Connection *connection) {
    double end = connection->began + connection->header.milliseconds / 1000.0;
    for (int turn = 0; turn < TURNS; turn++) {
        if (now() >= end)
            return 0;
        ssize_t sent = pour(connection);
        if (sent <= 0)
            return sent == 0;
    }
    return 1;
}

static int serve(Connection *connection) {
    if (connection->header_bytes < (int)sizeof connection->header)
        return read_header(connection);
    switch (connection->header.mode) {
    case 'E':
        return echo(connection);
    case 'U':
        return swallow(connection);
    case 'D':
        return give(connection);
    }
    return 0;
}

static void server(int port) {
    make_source();
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096))
        fail("listen");
    Connection listening = {.fd = listener};
    watch(EPOLL_CTL_ADD, &listening, EPOLLIN);
    struct epoll_event events[EVENTS];
    for (;;) {
        int count = epoll_wait(poller, events, EVENTS, -1);
        for (int at = 0; at < count; at++) {
            Connection *connection = events[at].data.ptr;
            if (connection == &listening)
                accept_all(listener);
            else if (!serve(connection))
                drop(connection);
        }
    }
}

// ---- client

static void dial(Connection *connection) {
    connection->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (connection->fd < 0)
        fail("socket");
    at_once(connection->fd);
    if (connect(connection->fd, (void *)&target, sizeof target) && errno != EINPROGRESS)
        fail("connect");
    connection->state = 0;
    connection->got = 0;
    watch(EPOLL_CTL_ADD, connection, EPOLLOUT);
}

// Whether the connection stands. One that cannot be made ends the run: then there is nothing to measure.
static void must_stand(Connection *connection) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        errno = error;
        fail("connection");
    }
}

static void hang_up(Connection *connection, int *open) {
    close(connection->fd);
    connection->ended = 1;
    (*open)--;
}

static void upload(Connection *connection, double end, uint64_t *sent, uint64_t *confirmed, int *open) {
    if (connection->state == 1) {
        for (int turn = 0; turn < TURNS; turn++) {
            if (now() >= end) {
                shutdown(connection->fd, SHUT_WR);
                connection->state = 2;
                watch(EPOLL_CTL_MOD, connection, EPOLLIN);
                return;
            }
            ssize_t now_sent = pour(connection);
            if (now_sent < 0)
                fail("upload");
            if (now_sent == 0)
                return;
            *sent += (uint64_t)now_sent;
        }
        return;
    }
    ssize_t got = recv(connection->fd, (char *)&connection->count + connection->count_bytes,
                       sizeof connection->count - (size_t)connection->count_bytes, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got > 0 && (connection->count_bytes += (int)got) < (int)sizeof connection->count)
        return;
    if (got <= 0) {
        fprintf(stderr, "upload: the stream ended without a confirmation\n");
        errors++;
    }
    *confirmed += connection->count;
    hang_up(connection, open);
}

static void download(Connection *connection, uint64_t *received, int *open) {
    for (int turn = 0; turn < TURNS; turn++) {
        ssize_t got = recv(connection->fd, buffer, SWALLOW, MSG_TRUNC);
        if (got < 0 && errno == EAGAIN)
            return;
        if (got <= 0) {
            if (got < 0) {
                perror("download");
                errors++;
            }
            hang_up(connection, open);
            return;
        }
        *received += (uint64_t)got;
    }
}

static void bulk(int up, int connections, double seconds) {
    if (up)
        make_source();
    Connection *all = calloc((size_t)connections, sizeof *all);
    Header header = {.mode = up ? 'U' : 'D', .milliseconds = (uint32_t)(seconds * 1000)};
    double began = now();
    for (int at = 0; at < connections; at++)
        dial(&all[at]);
    uint64_t moved = 0, confirmed = 0;
    int open = connections;
    struct epoll_event events[EVENTS];
    while (open && now() < began + seconds + GRACE_SECONDS) {
        int count = epoll_wait(poller, events, EVENTS, 1000);
        for (int at = 0; at < count; at++) {
            Connection *connection = events[at].data.ptr;
            if (connection->state == 0) {
                must_stand(connection);
                if (send(connection->fd, &header, sizeof header, 0) != sizeof header)
                    fail("header");
                connection->state = 1;
                if (!up)
                    watch(EPOLL_CTL_MOD, connection, EPOLLIN);
            } else if (up) {
                upload(connection, began + seconds, &moved, &confirmed, &open);
            } else {
                download(connection, &moved, &open);
            }
        }
    }
    double took = now() - began;
    if (open || (up && moved != confirmed)) {
        fprintf(stderr, "%d connections did not end; sent %lu, confirmed %lu\n", open, moved, confirmed);
        errors++;
    }
    printf("{\"bytes\": %lu, \"seconds\": %.4f, \"errors\": %lu, \"generator_cpu\": %.3f}\n", moved, took, errors, cpu_seconds());
}

static int by_size(const void *one, const void *other) {
    uint32_t left = *(const uint32_t *)one, right = *(const uint32_t *)other;
    return (left > right) - (left < right);
}

static uint32_t *times;  // of answers, in units of 10 ns
static size_t time_count;
static const size_t TIME_ROOM = 4 << 20;
static char request[sizeof(Header) + LARGEST];

static void answered(Connection *connection, int again, int bytes, double from) {
    double end = now();
    if (end > from && time_count < TIME_ROOM)
        times[time_count++] = (uint32_t)((end - connection->began) * 1e8);
    if (again) {
        close(connection->fd);
        connection->began = now();
        dial(connection);
        return;
    }
    connection->got = 0;
    connection->began = now();
    if (send(connection->fd, request + sizeof(Header), (size_t)bytes, 0) != bytes)
        fail("send");
}

static void converse(Connection *connection, int shorts, int bytes, double from) {
    if (connection->state == 0) {
        must_stand(connection);
        if (!shorts)
            connection->began = now();
        // The server takes the header off and echoes what follows it.
        if (send(connection->fd, request, sizeof(Header) + (size_t)bytes, 0) != (ssize_t)sizeof(Header) + bytes)
            fail("send");
        connection->state = 1;
        watch(EPOLL_CTL_MOD, connection, EPOLLIN);
        return;
    }
    ssize_t got = recv(connection->fd, buffer, sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0) {
        errors++;
        close(connection->fd);
        connection->began = now();
        dial(connection);
        return;
    }
    connection->got += (int)got;
    if (connection->got > bytes) {
        fprintf(stderr, "more came back than was sent\n");
        errors++;
    }
    if (connection->got >= bytes)
        answered(connection, shorts, bytes, from);
}

static double percentile(double part) {
    return time_count ? times[(size_t)((double)(time_count - 1) * part)] / 100.0 : 0;
}

static void conversations(int shorts, int connections, int bytes, double seconds) {
    if (bytes < 1 || bytes > LARGEST)
        fail("bytes");
    Connection *all = calloc((size_t)connections, sizeof *all);
    times = malloc(TIME_ROOM * sizeof *times);
    Header header = {.mode = 'E'};
    memset(request, 'x', sizeof request);
    memcpy(request, &header, sizeof header);
    double began = now(), from = began + (shorts ? 0 : WARM_UP_SECONDS), progress = began;
    for (int at = 0; at < connections; at++) {
        all[at].began = now();
        dial(&all[at]);
    }
    struct epoll_event events[EVENTS];
    while (now() < began + seconds && errors < 1000) {
        int count = epoll_wait(poller, events, EVENTS, 200);
        if (count > 0)
            progress = now();
        if (now() > progress + STALL_SECONDS) {
            fprintf(stderr, "nothing has moved for %d s\n", STALL_SECONDS);
            errors++;
            break;
        }
        for (int at = 0; at < count; at++)
            converse(events[at].data.ptr, shorts, bytes, from);
    }
    double took = now() - from;
    qsort(times, time_count, sizeof *times, by_size);
    printf("{\"count\": %zu, \"seconds\": %.4f, \"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f, "
           "\"errors\": %lu, \"generator_cpu\": %.3f}\n",
           time_count, took, percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999), errors, cpu_seconds());
}

// How many of them do not echo one more byte. Only the first silent one is waited for: the others have had the same time.
static int lost(const int *fds, int connections) {
    int missing = 0, flags = 0;
    for (int at = 0; at < connections; at++)
        send(fds[at], "x", 1, 0);  // one that is broken has no answer either
    for (int at = 0; at < connections; at++) {
        ssize_t got = recv(fds[at], buffer, 1, flags);
        if (got == 1)
            continue;
        if (got < 0 && errno == EAGAIN)
            flags = MSG_DONTWAIT;
        missing++;
    }
    return missing;
}

static int idle(int connections) {
    Header header = {.mode = 'E'};
    char first[sizeof header + 1];
    memcpy(first, &header, sizeof header);
    first[sizeof header] = 'x';
    int *fds = calloc((size_t)connections, sizeof *fds);
    for (int at = 0; at < connections; at++) {
        int fd = fds[at] = socket(AF_INET, SOCK_STREAM, 0);
        struct timeval patience = {STALL_SECONDS, 0};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        if (fd < 0 || connect(fd, (void *)&target, sizeof target) || send(fd, first, sizeof first, 0) != sizeof first)
            fail("idle");
        // Only an answer proves that the whole way is open.
        if (recv(fd, buffer, 1, 0) != 1) {
            fprintf(stderr, "idle: no answer on connection %d\n", at);
            exit(1);
        }
    }
    printf("ready\n");
    fflush(stdout);
    while (read(0, buffer, sizeof buffer) > 0)
        ;
    int missing = lost(fds, connections);
    printf("{\"count\": %d, \"errors\": %d}\n", connections, missing);
    return missing > 0;
}

int main(int count, char **words) {
    signal(SIGPIPE, SIG_IGN);
    poller = epoll_create1(0);
    const char *what = count > 1 ? words[1] : "";
    if (count == 3 && !strcmp(what, "server")) {
        server(atoi(words[2]));
        return 0;
    }
    if (count > 4) {
        target.sin_family = AF_INET;
        target.sin_port = htons((uint16_t)atoi(words[3]));
        if (!inet_aton(words[2], &target.sin_addr))
            fail("address");
    }
    int connections = count > 4 ? atoi(words[4]) : 0;
    if (count == 6 && (!strcmp(what, "up") || !strcmp(what, "down")))
        bulk(what[0] == 'u', connections, atof(words[5]));
    else if (count == 7 && (!strcmp(what, "ping") || !strcmp(what, "short")))
        conversations(what[0] == 's', connections, atoi(words[5]), atof(words[6]));
    else if (count == 5 && !strcmp(what, "idle"))
        return idle(connections);
    else {
        fprintf(stderr, "load: what is asked for is at the beginning of load.c\n");
        return 2;
    }
    return 0;
}

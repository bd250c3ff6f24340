/* ztunnel-cni: the last plugin in a node's CNI chain. It changes nothing of a pod's network; it asks the node agent, over a Unix socket,
 * whether the pod may start, and hands the chain's result on byte by byte.
 *
 * It runs on the host, whatever the host is: static, no files of its own, a few kilobytes. The agent parses and decides; what is
 * here is what has to hold when there is no agent: pods that the agent wrote down as outside of the mesh start, and those of the agent's own
 * namespace, which would wait for themselves; all others wait.
 *
 *   ADD     the agent's answer; without one, the list's. Refused: error 11 (try again later), which kubelet does.
 *   CHECK   likewise.
 *   DEL, GC the agent is told; always a success, since a pod that cannot be deleted helps nobody.
 *   STATUS  a success as long as somebody, agent or list, can answer an ADD.
 *
 * Everything is bounded: 1 MiB of configuration, 64 levels of JSON, 4 MiB of list, every wait by a deadline.
 *
 * To the agent: "ztunnel-cni 1\n", then NAME=VALUE\0 for each of `forwarded`, then standard input as it came, then end of file.
 * From the agent: "ok\n" or "refused CODE TEXT\n", then end of file. Anything else is no answer.
 *
 * Source: CNI specification 0.3.1 to 1.1.0 (github.com/containernetworking/cni, SPEC.md).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_INPUT = 1 << 20,
    MAX_KNOWN = 4 << 20,
    MAX_VALUE = 4096,
    MAX_DEPTH = 64,
    MAX_ANSWER = 2048,
    INPUT_SECONDS = 30,
    NEWS_SECONDS = 2, /* what the agent is told, and need not answer */
    DEFAULT_WAIT_SECONDS = 30,
    MAX_WAIT_SECONDS = 300,
};

/* Of the specification, "Error". */
enum { INCOMPATIBLE = 1, BAD_ENVIRONMENT = 4, INPUT_OUTPUT = 5, UNDECODABLE = 6, BAD_CONFIGURATION = 7, TRY_LATER = 11, UNAVAILABLE = 50 };

static const char *const versions[] = {"0.3.1", "0.4.0", "1.0.0", "1.1.0"};
enum { VERSIONS = sizeof versions / sizeof *versions };
static const char *const forwarded[] = {"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"};
enum { FORWARDED = sizeof forwarded / sizeof *forwarded };

/* Bytes of somebody else's; of a JSON string without its quotes. Absent: `at` is null. */
typedef struct {
    const char *at;
    size_t length;
} slice;

static char input[MAX_INPUT + 1];
static size_t input_length;
static char list[MAX_KNOWN + 1];
static slice version, socket_path, known_path, own_namespace, wait_seconds, previous;

static bool is(slice text, const char *word) { return text.at != NULL && text.length == strlen(word) && memcmp(text.at, word, text.length) == 0; }

/* ---- Output: one buffer, one write ---- */

static char output[4096];
static size_t output_length;

static void append(const char *text, size_t length) {
    if (length > sizeof output - output_length) length = sizeof output - output_length;
    memcpy(output + output_length, text, length);
    output_length += length;
}

static void say(const char *text) { append(text, strlen(text)); }

/* Text of others inside a JSON string: what would need an escape becomes a question mark. */
static void quote(slice text) {
    for (size_t i = 0; i < text.length && i < 1024; i++) {
        unsigned char byte = (unsigned char)text.at[i];
        append(byte < 0x20 || byte > 0x7e || byte == '"' || byte == '\\' ? "?" : text.at + i, 1);
    }
}

static bool write_all(const char *bytes, size_t length) {
    while (length > 0) {
        ssize_t written = write(STDOUT_FILENO, bytes, length);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return false;
        bytes += written;
        length -= (size_t)written;
    }
    return true;
}

static const char *spoken_version(void) {
    for (int i = 0; i < VERSIONS; i++)
        if (is(version, versions[i])) return versions[i];
    return versions[VERSIONS - 1];
}

static _Noreturn void fail(int code, const char *message, slice details) {
    char digits[4] = {0};
    int at = 0;
    if (code > 99) digits[at++] = (char)('0' + code / 100 % 10);
    if (code > 9) digits[at++] = (char)('0' + code / 10 % 10);
    digits[at] = (char)('0' + code % 10);
    output_length = 0;
    say("{\"cniVersion\":\"");
    say(spoken_version());
    say("\",\"code\":");
    say(digits);
    say(",\"msg\":\"");
    say(message);
    say("\",\"details\":\"");
    quote(details);
    say("\"}\n");
    write_all(output, output_length);
    exit(1);
}

static slice text(const char *word) { return (slice){word, strlen(word)}; }

/* ---- JSON: checked whole, but kept only where the top level has a name of ours ---- */

static const char *cursor, *limit;

static void skip_space(void) {
    while (cursor < limit && (*cursor == ' ' || *cursor == '\t' || *cursor == '\n' || *cursor == '\r')) cursor++;
}

static bool take(char wanted) {
    skip_space();
    if (cursor == limit || *cursor != wanted) return false;
    cursor++;
    return true;
}

static bool is_digit(char each) { return each >= '0' && each <= '9'; }

static bool is_hexadecimal(char each) { return is_digit(each) || (each >= 'a' && each <= 'f') || (each >= 'A' && each <= 'F'); }

static bool take_string(slice *content) {
    if (!take('"')) return false;
    const char *start = cursor;
    while (cursor < limit && *cursor != '"') {
        if ((unsigned char)*cursor < 0x20) return false;
        if (*cursor++ != '\\') continue;
        if (cursor == limit) return false;
        char escape = *cursor++;
        if (escape == 'u') {
            for (int i = 0; i < 4; i++)
                if (cursor == limit || !is_hexadecimal(*cursor++)) return false;
        } else if (strchr("\"\\/bfnrt", escape) == NULL || escape == '\0') {
            return false;
        }
    }
    if (cursor == limit) return false;
    *content = (slice){start, (size_t)(cursor - start)};
    cursor++;
    return true;
}

static bool take_digits(void) {
    if (cursor == limit || !is_digit(*cursor)) return false;
    while (cursor < limit && is_digit(*cursor)) cursor++;
    return true;
}

static bool take_number(void) {
    if (cursor < limit && *cursor == '-') cursor++;
    if (cursor < limit && *cursor == '0')
        cursor++;
    else if (!take_digits())
        return false;
    if (cursor < limit && *cursor == '.') {
        cursor++;
        if (!take_digits()) return false;
    }
    if (cursor < limit && (*cursor == 'e' || *cursor == 'E')) {
        cursor++;
        if (cursor < limit && (*cursor == '+' || *cursor == '-')) cursor++;
        if (!take_digits()) return false;
    }
    return true;
}

static bool take_scalar(void) {
    static const char *const words[] = {"true", "false", "null"};
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(words[i]);
        if ((size_t)(limit - cursor) >= length && memcmp(cursor, words[i], length) == 0) {
            cursor += length;
            return true;
        }
    }
    return take_number();
}

static bool take_key(slice *name) { return take_string(name) && take(':'); }

/* One value of any kind, with its quotes and brackets. Without recursion: `objects` has a bit for each open bracket, the innermost lowest. */
static bool take_value(slice *whole) {
    slice ignored;
    uint64_t objects = 0;
    int depth = 0;
    skip_space();
    const char *start = cursor;
    for (;;) {
        skip_space();
        if (cursor == limit) return false;
        if (*cursor == '{' || *cursor == '[') {
            if (depth++ == MAX_DEPTH) return false;
            bool object = *cursor++ == '{';
            objects = objects << 1 | object;
            skip_space();
            if (cursor == limit) return false;
            if (*cursor != (object ? '}' : ']')) {
                if (object && !take_key(&ignored)) return false;
                continue;
            }
        } else if (*cursor == '"') {
            if (!take_string(&ignored)) return false;
        } else if (!take_scalar()) {
            return false;
        }
        for (;;) {
            if (depth == 0) {
                *whole = (slice){start, (size_t)(cursor - start)};
                return true;
            }
            if (take(',')) {
                if (objects & 1 && !take_key(&ignored)) return false;
                break;
            }
            if (!take(objects & 1 ? '}' : ']')) return false;
            objects >>= 1;
            depth--;
        }
    }
}

static bool keep(slice name, slice value) {
    const struct {
        const char *name;
        slice *place;
    } ours[] = {
        {"cniVersion", &version},       {"socket", &socket_path},       {"known", &known_path},
        {"ownNamespace", &own_namespace}, {"waitSeconds", &wait_seconds}, {"prevResult", &previous},
    };
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) {
        if (!is(name, ours[i].name)) continue;
        if (ours[i].place->at != NULL) return false; /* twice: whoever else reads it may take the other one */
        *ours[i].place = value;
        if (is(value, "null")) *ours[i].place = (slice){NULL, 0};
    }
    return true;
}

static bool parse_input(void) {
    slice name, value;
    cursor = input;
    limit = input + input_length;
    if (!take('{')) return false;
    if (!take('}')) {
        do {
            if (!take_key(&name) || !take_value(&value) || !keep(name, value)) return false;
        } while (take(','));
        if (!take('}')) return false;
    }
    skip_space();
    return cursor == limit;
}

/* A JSON string without escapes, or absent. */
static slice plain_string(slice value) {
    if (value.at == NULL || value.length < 2 || value.at[0] != '"' || memchr(value.at, '\\', value.length) != NULL) return (slice){NULL, 0};
    return (slice){value.at + 1, value.length - 2};
}

/* ---- Time ---- */

static int64_t now_milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static bool wait_for(int descriptor, short events, int64_t deadline) {
    for (;;) {
        int64_t left = deadline - now_milliseconds();
        struct pollfd waited = {.fd = descriptor, .events = events};
        if (left <= 0) return false;
        int ready = poll(&waited, descriptor < 0 ? 0 : 1, (int)left);
        if (ready < 0 && errno == EINTR) continue;
        return ready > 0;
    }
}

/* 0: end of file; -1: error or too late; never a short wait. */
static ssize_t read_some(int descriptor, char *place, size_t size, int64_t deadline) {
    for (;;) {
        if (!wait_for(descriptor, POLLIN, deadline)) return -1;
        ssize_t got = read(descriptor, place, size);
        if (got >= 0 || (errno != EINTR && errno != EAGAIN)) return got;
    }
}

static int64_t in_seconds(long seconds) { return now_milliseconds() + seconds * 1000; }

/* ---- The agent ---- */

static bool send_all(int connection, const char *bytes, size_t length, int64_t deadline) {
    while (length > 0) {
        if (!wait_for(connection, POLLOUT, deadline)) return false;
        ssize_t sent = send(connection, bytes, length, MSG_NOSIGNAL);
        if (sent < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (sent <= 0) return false;
        bytes += sent;
        length -= (size_t)sent;
    }
    return true;
}

static int connect_agent(slice path, int64_t deadline) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (path.at == NULL || path.length == 0 || path.length >= sizeof address.sun_path) return -1;
    memcpy(address.sun_path, path.at, path.length);
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (connection < 0) return -1;
    /* EAGAIN: its backlog is full. */
    while (connect(connection, (struct sockaddr *)&address, sizeof address) != 0) {
        if ((errno != EAGAIN && errno != EINTR) || now_milliseconds() >= deadline) {
            close(connection);
            return -1;
        }
        poll(NULL, 0, 20);
    }
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.uid != 0) {
        close(connection);
        return -1;
    }
    return connection;
}

static bool send_request(int connection, int64_t deadline) {
    static const char greeting[] = "ztunnel-cni 1\n";
    if (!send_all(connection, greeting, sizeof greeting - 1, deadline)) return false;
    for (int i = 0; i < FORWARDED; i++) {
        const char *value = getenv(forwarded[i]);
        if (value == NULL) value = "";
        if (!send_all(connection, forwarded[i], strlen(forwarded[i]), deadline) || !send_all(connection, "=", 1, deadline) ||
            !send_all(connection, value, strlen(value) + 1, deadline))
            return false;
    }
    return send_all(connection, input, input_length, deadline) && shutdown(connection, SHUT_WR) == 0;
}

/* The agent's answer without its line feed; absent when it gives none in time. */
static slice ask_agent(long seconds) {
    static char answer[MAX_ANSWER];
    size_t length = 0;
    ssize_t got = -1;
    int64_t deadline = in_seconds(seconds);
    int connection = connect_agent(plain_string(socket_path), deadline);
    if (connection < 0) return (slice){NULL, 0};
    if (send_request(connection, deadline)) {
        while (length < sizeof answer && (got = read_some(connection, answer + length, sizeof answer - length, deadline)) > 0) length += (size_t)got;
    }
    close(connection);
    if (got != 0 || length == 0 || answer[length - 1] != '\n') return (slice){NULL, 0};
    return (slice){answer, length - 1};
}

/* "refused CODE TEXT" ends the process. True: "ok". False: no answer that could be understood. */
static bool heed(slice answer) {
    static const char word[] = "refused ";
    size_t at = sizeof word - 1;
    int code = 0;
    if (is(answer, "ok")) return true;
    if (answer.at == NULL || answer.length < at || memcmp(answer.at, word, at) != 0) return false;
    while (at < answer.length && is_digit(answer.at[at]) && code < 100) code = code * 10 + (answer.at[at++] - '0');
    if (code == 0 || at == answer.length || answer.at[at] != ' ') return false;
    fail(code, "ztunnel: the node agent refuses", (slice){answer.at + at + 1, answer.length - at - 1});
}

/* ---- The list that the agent leaves ---- */

static size_t load_list(void) {
    char path[MAX_VALUE];
    slice named = plain_string(known_path);
    struct stat found;
    size_t length = 0;
    ssize_t got = -1;
    if (named.at == NULL || named.length == 0 || named.length >= sizeof path) return 0;
    memcpy(path, named.at, named.length);
    path[named.length] = '\0';
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file < 0) return 0;
    if (fstat(file, &found) == 0 && S_ISREG(found.st_mode) && found.st_uid == 0 && (found.st_mode & (S_IWGRP | S_IWOTH)) == 0) {
        while (length < sizeof list && (got = read(file, list + length, sizeof list - length)) > 0) length += (size_t)got;
    }
    close(file);
    static const char first[] = "ztunnel-cni-known 1\n", last[] = "\nend\n";
    size_t head = sizeof first - 1, tail = sizeof last - 1;
    if (got != 0 || length < head + tail - 1 || memcmp(list, first, head) != 0 || memcmp(list + length - tail, last, tail) != 0) return 0;
    return length;
}

static bool has_line(size_t length, const char *start, slice name) {
    size_t prefix = strlen(start);
    for (const char *line = list, *end = list + length; line < end;) {
        const char *stop = memchr(line, '\n', (size_t)(end - line));
        if ((size_t)(stop - line) == prefix + name.length && memcmp(line, start, prefix) == 0 && memcmp(line + prefix, name.at, name.length) == 0)
            return true;
        line = stop + 1;
    }
    return false;
}

/* What CNI_ARGS ("A=1;B=2") says; absent if nothing, or nothing that can be looked up; `twice` if it is not of one mind. */
static slice argument(const char *name, bool *twice) {
    slice found = {NULL, 0};
    const char *at = getenv("CNI_ARGS");
    size_t length = strlen(name);
    while (at != NULL) {
        if (strncmp(at, name, length) == 0 && at[length] == '=') {
            if (found.at != NULL) *twice = true;
            const char *value = at + length + 1;
            found = (slice){value, strcspn(value, ";")};
        }
        at = strchr(at, ';');
        if (at != NULL) at++;
    }
    return found.length > 0 && memchr(found.at, '\n', found.length) == NULL ? found : (slice){NULL, 0};
}

/* Returns only if the list says that the pod is outside of the mesh, or it may be the agent: that must not wait for itself. */
static void consult_list(slice namespace, slice uid) {
    size_t length = load_list();
    slice own = plain_string(own_namespace);
    if (own.at != NULL && own.length == namespace.length && memcmp(own.at, namespace.at, own.length) == 0) return;
    if (length == 0) fail(TRY_LATER, "ztunnel: the node agent does not answer, and left no list of pods outside of the mesh", plain_string(known_path));
    if (uid.at != NULL && has_line(length, "refuse pod ", uid)) fail(TRY_LATER, "ztunnel: the node agent does not answer, and the pod is in the mesh", uid);
    if ((uid.at != NULL && has_line(length, "allow pod ", uid)) || has_line(length, "allow namespace ", namespace)) return;
    fail(TRY_LATER, "ztunnel: the node agent does not answer, and the namespace may be in the mesh", namespace);
}

/* ---- Commands ---- */

static long patience(void) {
    long seconds = 0;
    if (wait_seconds.at == NULL) return DEFAULT_WAIT_SECONDS;
    for (size_t i = 0; i < wait_seconds.length; i++) {
        if (!is_digit(wait_seconds.at[i]) || (seconds = seconds * 10 + (wait_seconds.at[i] - '0')) > MAX_WAIT_SECONDS)
            fail(BAD_CONFIGURATION, "ztunnel: waitSeconds: a whole number up to 300 is expected", wait_seconds);
    }
    return seconds > 0 ? seconds : DEFAULT_WAIT_SECONDS;
}

static void check_environment(void) {
    for (int i = 0; i < FORWARDED; i++) {
        const char *value = getenv(forwarded[i]);
        if (value != NULL && strlen(value) > MAX_VALUE) fail(BAD_ENVIRONMENT, "ztunnel: a variable is too long", text(forwarded[i]));
        if (i < 4 && (value == NULL || *value == '\0')) fail(BAD_ENVIRONMENT, "ztunnel: a variable is not set", text(forwarded[i]));
    }
}

/* Returns if the pod may start. */
static void ask_for_pod(void) {
    bool twice = false;
    slice namespace = argument("K8S_POD_NAMESPACE", &twice), uid = argument("K8S_POD_UID", &twice);
    if (twice) fail(BAD_ENVIRONMENT, "ztunnel: CNI_ARGS names a pod twice", text(""));
    if (previous.at == NULL || previous.at[0] != '{')
        fail(BAD_CONFIGURATION, "ztunnel: prevResult is missing: this plugin must be the last of a chain, not alone", text(""));
    if (namespace.at == NULL) return; /* no pod of Kubernetes */
    if (!heed(ask_agent(patience()))) consult_list(namespace, uid);
}

static void print_version(void) {
    say("{\"cniVersion\":\"");
    say(spoken_version());
    say("\",\"supportedVersions\":[");
    for (int i = 0; i < VERSIONS; i++) {
        say(i == 0 ? "\"" : ",\"");
        say(versions[i]);
        say("\"");
    }
    say("]}\n");
    write_all(output, output_length);
}

static void read_input(void) {
    int64_t deadline = in_seconds(INPUT_SECONDS);
    ssize_t got = 0;
    while (input_length < sizeof input && (got = read_some(STDIN_FILENO, input + input_length, sizeof input - input_length, deadline)) > 0)
        input_length += (size_t)got;
    if (got < 0) fail(INPUT_OUTPUT, "ztunnel: the configuration cannot be read from standard input", text(""));
    if (input_length > MAX_INPUT) fail(UNDECODABLE, "ztunnel: the configuration is larger than 1 MiB", text(""));
}

int main(void) {
    const char *set = getenv("CNI_COMMAND");
    slice command = text(set == NULL ? "" : set);
    bool goes = is(command, "DEL") || is(command, "GC"), adds = is(command, "ADD"), checks = is(command, "CHECK");
    if (!goes && !adds && !checks && !is(command, "STATUS") && !is(command, "VERSION"))
        fail(BAD_ENVIRONMENT, "ztunnel: CNI_COMMAND is none of ADD, DEL, CHECK, GC, STATUS, VERSION", command);
    read_input();
    bool parsed = parse_input();
    version = plain_string(version);
    if (goes) {
        if (parsed) ask_agent(NEWS_SECONDS);
        return 0;
    }
    if (!parsed) fail(UNDECODABLE, "ztunnel: the configuration is not the JSON that it should be", text(""));
    if (is(command, "VERSION")) {
        print_version();
        return 0;
    }
    if (!is(version, spoken_version())) fail(INCOMPATIBLE, "ztunnel: cniVersion is none of 0.3.1, 0.4.0, 1.0.0, 1.1.0", version);
    if (is(command, "STATUS")) {
        if (!heed(ask_agent(NEWS_SECONDS)) && load_list() == 0)
            fail(UNAVAILABLE, "ztunnel: the node agent does not answer, and left no list of pods outside of the mesh", plain_string(known_path));
        return 0;
    }
    check_environment();
    ask_for_pod();
    if (adds && (!write_all(previous.at, previous.length) || !write_all("\n", 1))) return 1;
    return 0;
}

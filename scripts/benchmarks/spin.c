// Keeps one CPU from halting: `spin CPU SECONDS`. A virtual CPU that halts takes 40-50 us to wake, which would drown the software in
// question. For where the kernel's idle loop cannot poll (machine.py). The policy SCHED_IDLE yields to whatever else wakes up.
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int main(int count, char **words) {
    if (count != 3) {
        fprintf(stderr, "usage: spin CPU SECONDS\n");
        return 2;
    }
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(atoi(words[1]), &cpus);
    struct sched_param priority = {0};
    if (sched_setaffinity(0, sizeof cpus, &cpus) || sched_setscheduler(0, SCHED_IDLE, &priority)) {
        perror("spin");
        return 1;
    }
    time_t end = time(NULL) + atoi(words[2]);
    while (time(NULL) < end)
        for (volatile int turn = 0; turn < 1000000; turn++)
            ;
    return 0;
}

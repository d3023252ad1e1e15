/*
 * Shifts the time of day of one process by the seconds in the file that STEPPED_CLOCK names, and no other clock. For
 * LD_PRELOAD. (libfaketime shifts monotonic time too, or has Python 3.11's time.sleep fail: it would test itself.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    FILE *file = clock == CLOCK_REALTIME ? fopen(getenv("STEPPED_CLOCK"), "r") : NULL;
    long seconds;
    if (file) {
        if (fscanf(file, "%ld", &seconds) == 1)
            now->tv_sec += seconds;
        fclose(file);
    }
    return result;
}

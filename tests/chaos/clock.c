/* A machine's clock that is wrong: the wall clock of a process is off by the seconds in the file $TRSR_CLOCK. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
  static __thread long seconds, looked;
  struct timespec now;
  syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
  if (now.tv_sec == looked) return seconds;
  looked = now.tv_sec, seconds = 0;
  const char *path = getenv("TRSR_CLOCK");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (file) {
    if (fscanf(file, "%ld", &seconds) != 1) seconds = 0;
    fclose(file);
  }
  return seconds;
}

int clock_gettime(clockid_t id, struct timespec *found) {
  int status = syscall(SYS_clock_gettime, id, found);
  if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) found->tv_sec += offset();
  return status;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
  int status = syscall(SYS_gettimeofday, found, zone);
  if (found) found->tv_sec += offset();
  return status;
}

time_t time(time_t *found) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (found) *found = now.tv_sec;
  return now.tv_sec;
}

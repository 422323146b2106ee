// A disk on which each fsync takes FSYNC_MS: a library for LD_PRELOAD.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int slow (const char *name, int fd) {
  const char *ms = getenv("FSYNC_MS");
  if (ms) usleep(atoi(ms) * 1000);
  int (*real)(int) = dlsym(RTLD_NEXT, name);
  return real(fd);
}

int fsync (int fd) { return slow("fsync", fd); }
int fdatasync (int fd) { return slow("fdatasync", fd); }

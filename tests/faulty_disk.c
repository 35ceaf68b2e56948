/* A disk that fails: load this with LD_PRELOAD, then `arm` one fault of the process.

   The n-th change of a file, counted per kind, is where the fault happens:
       KILL_BEFORE   the process is killed before the change
       KILL_TORN     a write is cut in half, any other change is made; then the process is killed
       FULL          a write is cut in half; this and every later write and mkdir fails: no space
       FAIL          this change alone fails: input/output error

   Calls of every library are seen, of Python, Rust and C++, except what the C library does by
   itself, such as fwrite. Only regular files count, and of these no standard stream. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, RENAME, MAKE, DELETE, KINDS };
enum { NOTHING, KILL_BEFORE, KILL_TORN, FULL, FAIL };

static atomic_long counts[KINDS];
static int armed_kind = -1, armed_action, is_full;
static long armed_at;

void arm(int kind, long at, int action) {
    for (int i = 0; i < KINDS; i++) counts[i] = 0;
    is_full = 0, armed_kind = kind, armed_at = at, armed_action = action;
}

long count_of(int kind) { return counts[kind]; }

/* Count one change -> what happens to it. */
static int fault(int kind) {
    long number = ++counts[kind];
    if (is_full && (kind == WRITE || kind == MAKE)) return FULL;
    if (kind != armed_kind || number != armed_at) return NOTHING;
    if (armed_action == KILL_BEFORE) kill(getpid(), SIGKILL);
    if (armed_action == FULL) is_full = 1;
    return armed_action;
}

static int is_file(int fd) {
    struct stat status;
    return fd > 2 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static ssize_t end_of_write(int action, ssize_t written) {
    if (action == KILL_TORN) kill(getpid(), SIGKILL);
    if (written > 0) return written;  /* a short write; its caller tries the rest */
    errno = action == FULL ? ENOSPC : EIO;
    return -1;
}

#define WRITES(name, parameters, whole, half)                                   \
    ssize_t name parameters {                                                   \
        int was_full = is_full, action = is_file(fd) ? fault(WRITE) : NOTHING;  \
        if (action == NOTHING) return REAL(name) whole;                         \
        int cut = action == KILL_TORN || (action == FULL && !was_full);         \
        return end_of_write(action, cut ? REAL(name) half : 0);                 \
    }

WRITES(write, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2))
WRITES(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at),
       (fd, data, size / 2, at))
WRITES(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at),
       (fd, data, size / 2, at))
WRITES(writev, (int fd, const struct iovec *parts, int count), (fd, parts, count),
       (fd, parts, count / 2))

#define CHANGES(kind, name, parameters, arguments)          \
    int name parameters {                                   \
        int action = fault(kind);                           \
        if (action == FULL || action == FAIL) {             \
            errno = action == FULL ? ENOSPC : EIO;          \
            return -1;                                      \
        }                                                   \
        int result = REAL(name) arguments;                  \
        if (action == KILL_TORN) kill(getpid(), SIGKILL);   \
        return result;                                      \
    }

CHANGES(RENAME, rename, (const char *from, const char *to), (from, to))
CHANGES(RENAME, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to))
CHANGES(MAKE, mkdir, (const char *path, mode_t mode), (path, mode))
CHANGES(MAKE, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode))
CHANGES(DELETE, unlink, (const char *path), (path))
CHANGES(DELETE, unlinkat, (int at, const char *path, int flags), (at, path, flags))
CHANGES(DELETE, rmdir, (const char *path), (path))

/* A file system without hard links, and with NO_FLOCK without flock, for LD_PRELOAD. */
#include <errno.h>

int link(const char *from, const char *to) { (void)from; (void)to; errno = EPERM; return -1; }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    (void)a; (void)from; (void)b; (void)to; (void)flags;
    errno = EPERM;
    return -1;
}
#ifdef NO_FLOCK
int flock(int file, int how) { (void)file; (void)how; errno = ENOLCK; return -1; }
#endif

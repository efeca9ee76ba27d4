/* Counts the calls of a whole tree of processes that change files, and kills or fails at one.

   tracer [-r FOLDER]... [-c CALLS] [-l LOG] [-d FOLDER] [-k N | -f N -e ERRNO [-o]] -- COMMAND...
   tracer ... -p PID

     -r FOLDER   count only what happens below it; several may be given
     -c CALLS    count only these, such as write,fsync,rename (see `calls` below)
     -l LOG      write a JSON line for each call that is counted, and one with the count
     -d FOLDER   keep in it, as FOLDER/N, the bytes that the Nth call wrote
     -k N        kill everything just before the Nth of them
     -f N -e E   have the Nth fail with this error, by number; -o: and all of them after it
     -p PID      a process that runs already, with all that it starts from now on

   Ends when all that it traces has ended, with the exit status of the command, or 137 after -k.
   Linux 5.3 or later, x86_64 or aarch64. Compile with `cc -O1 -Wall -Wno-missing-field-initializers`. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <elf.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <linux/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

/* What a call changes: a file by a descriptor, or paths, each of them beside a folder's descriptor
   or not. Of an open only those count that may write. */
enum kind { OPEN, WRITE, DESCRIPTOR, PATH, TWO };
struct call {
    long number;
    const char *name;
    enum kind kind;
    int at;       /* which argument has the path, or the descriptor that is written to */
    int folder;   /* which one has the descriptor of the path's folder; -1: none */
    int other;    /* of two paths: which one has the second */
    int other_folder;
    int offset;   /* of a write: which one has the offset; -1: where the file stands */
};
#define CALL(name, ...) {SYS_##name, #name, __VA_ARGS__}
static const struct call calls[] = {
    CALL(openat, OPEN, 1, 0), CALL(openat2, OPEN, 1, 0),
    CALL(write, WRITE, 0, -1, 0, 0, -1), CALL(pwrite64, WRITE, 0, -1, 0, 0, 3),
    CALL(writev, WRITE, 0, -1, 0, 0, -1), CALL(pwritev, WRITE, 0, -1, 0, 0, 3),
    CALL(pwritev2, WRITE, 0, -1, 0, 0, 3), CALL(sendfile, WRITE, 0, -1, 0, 0, -1),
    CALL(copy_file_range, WRITE, 2, -1, 0, 0, -1), CALL(splice, WRITE, 2, -1, 0, 0, -1),
    CALL(ftruncate, DESCRIPTOR, 0, -1), CALL(fallocate, DESCRIPTOR, 0, -1),
    CALL(fsync, DESCRIPTOR, 0, -1), CALL(fdatasync, DESCRIPTOR, 0, -1), CALL(syncfs, DESCRIPTOR, 0, -1),
    CALL(fchmod, DESCRIPTOR, 0, -1), CALL(fchown, DESCRIPTOR, 0, -1),
    CALL(truncate, PATH, 0, -1), CALL(mkdirat, PATH, 1, 0), CALL(unlinkat, PATH, 1, 0),
    CALL(fchmodat, PATH, 1, 0), CALL(fchownat, PATH, 1, 0), CALL(utimensat, PATH, 1, 0),
    CALL(symlinkat, PATH, 2, 1), CALL(linkat, TWO, 1, 0, 3, 2),
    CALL(renameat, TWO, 1, 0, 3, 2), CALL(renameat2, TWO, 1, 0, 3, 2),
#ifdef SYS_open /* those that newer processors do without */
    CALL(open, OPEN, 0, -1), CALL(creat, OPEN, 0, -1), CALL(mkdir, PATH, 0, -1),
    CALL(rmdir, PATH, 0, -1), CALL(unlink, PATH, 0, -1), CALL(chmod, PATH, 0, -1),
    CALL(chown, PATH, 0, -1), CALL(lchown, PATH, 0, -1), CALL(symlink, PATH, 1, -1),
    CALL(rename, TWO, 0, -1, 1, -1), CALL(link, TWO, 0, -1, 1, -1),
#endif
};
#define COUNT(array) (sizeof(array) / sizeof(*(array)))

/* One that is under way in a thread. */
struct thread {
    pid_t tid;
    const struct call *call; /* NULL: none that counts */
    unsigned long number;    /* of those that count */
    int fails;
    int fd;
    uint64_t args[6];
    long long offset;
    char path[PATH_MAX], other[PATH_MAX];
};
static struct thread *threads;
static size_t thread_count, thread_room;

static const char *roots[64], *only, *bytes_folder;
static size_t root_count;
static FILE *log_file;
static unsigned long counted, kill_at, fail_at;
static int fail_with, fail_on;

static void die(const char *what) {
    perror(what);
    exit(125);
}

static struct thread *thread(pid_t tid) {
    for (size_t i = 0; i < thread_count; i++)
        if (threads[i].tid == tid) return &threads[i];
    if (thread_count == thread_room) {
        thread_room = thread_room ? 2 * thread_room : 64;
        if (!(threads = realloc(threads, thread_room * sizeof *threads))) die("realloc");
    }
    struct thread *made = &threads[thread_count++];
    memset(made, 0, sizeof *made);
    made->tid = tid;
    return made;
}

static void forget(pid_t tid) {
    for (size_t i = 0; i < thread_count; i++)
        if (threads[i].tid == tid) threads[i] = threads[--thread_count];
}

/* A text in a process's memory, read page by page: what follows it may not be there. */
static int text(pid_t tid, uint64_t from, char *to) {
    size_t have = 0;
    while (have < PATH_MAX - 1) {
        size_t step = 4096 - (from + have) % 4096;
        if (step > PATH_MAX - 1 - have) step = PATH_MAX - 1 - have;
        struct iovec mine = {to + have, step}, theirs = {(void *)(uintptr_t)(from + have), step};
        ssize_t got = process_vm_readv(tid, &mine, 1, &theirs, 1, 0);
        if (got <= 0) return -1;
        if (memchr(to + have, 0, got)) return 0;
        have += got;
    }
    return -1;
}

/* Where a descriptor leads, or with AT_FDCWD the current folder. */
static int link_of(pid_t tid, int fd, char *to) {
    char name[64];
    if (fd == AT_FDCWD) snprintf(name, sizeof name, "/proc/%d/cwd", tid);
    else snprintf(name, sizeof name, "/proc/%d/fd/%d", tid, fd);
    ssize_t got = readlink(name, to, PATH_MAX - 1);
    if (got < 0) return -1;
    to[got] = 0;
    return 0;
}

static int path_of(pid_t tid, const uint64_t *args, int at, int folder, char *to) {
    char name[PATH_MAX];
    if (text(tid, args[at], name)) return -1;
    if (name[0] == '/') return strcpy(to, name), 0;
    if (link_of(tid, folder < 0 ? AT_FDCWD : (int)args[folder], to)) return -1;
    size_t length = strlen(to);
    if (!*name) return 0; /* the descriptor itself */
    return snprintf(to + length, PATH_MAX - length, "/%s", name) >= (int)(PATH_MAX - length) ? -1 : 0;
}

static int is_below(const char *path) {
    if (!strncmp(path, "/proc/", 6) || path[0] != '/') return 0;
    if (!strncmp(path, "/dev/", 5) && strncmp(path, "/dev/shm/", 9)) return 0;
    for (size_t i = 0; i < root_count; i++) {
        size_t length = strlen(roots[i]);
        if (!strncmp(path, roots[i], length) && (path[length] == '/' || !path[length])) return 1;
    }
    return !root_count;
}

static int is_meant(const char *name) {
    if (!only) return 1;
    size_t length = strlen(name);
    for (const char *at = only; (at = strstr(at, name)); at += length)
        if ((at == only || at[-1] == ',') && (!at[length] || at[length] == ',')) return 1;
    return 0;
}

static uint64_t open_flags(pid_t tid, const struct call *call, const uint64_t *args) {
    if (!strcmp(call->name, "creat")) return O_CREAT | O_WRONLY | O_TRUNC;
    if (strcmp(call->name, "openat2")) return args[call->at + 1];
    uint64_t flags = 0;
    struct iovec mine = {&flags, 8}, theirs = {(void *)(uintptr_t)args[2], 8};
    process_vm_readv(tid, &mine, 1, &theirs, 1, 0);
    return flags;
}

/* Where the next write to a descriptor goes. */
static long long position(pid_t tid, int fd) {
    char name[64], line[128];
    long long at = 0;
    unsigned flags = 0;
    snprintf(name, sizeof name, "/proc/%d/fdinfo/%d", tid, fd);
    FILE *info = fopen(name, "r");
    if (!info) return -1;
    while (fgets(line, sizeof line, info))
        if (sscanf(line, "pos: %lld", &at) != 1) sscanf(line, "flags: %o", &flags);
    fclose(info);
    if (!(flags & O_APPEND)) return at;
    snprintf(name, sizeof name, "/proc/%d/fd/%d", tid, fd);
    int file = open(name, O_RDONLY);
    if (file >= 0) at = lseek(file, 0, SEEK_END), close(file);
    return at;
}

/* Whether a call counts; if so its paths are in the thread. */
static int counts(struct thread *it, const struct call *call) {
    if (!is_meant(call->name)) return 0;
    it->other[0] = 0;
    it->fd = -1;
    switch (call->kind) {
    case OPEN:
        if (!(open_flags(it->tid, call, it->args) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return 0;
        return !path_of(it->tid, it->args, call->at, call->folder, it->path) && is_below(it->path);
    case WRITE:
    case DESCRIPTOR:
        it->fd = it->args[call->at];
        return !link_of(it->tid, it->fd, it->path) && is_below(it->path);
    case TWO:
        if (path_of(it->tid, it->args, call->other, call->other_folder, it->other)) return 0;
        /* fall through */
    default:
        /* utimensat and fchownat may name a descriptor and no path */
        if (!it->args[call->at]) {
            if (call->folder < 0 || link_of(it->tid, it->args[call->folder], it->path)) return 0;
        } else if (path_of(it->tid, it->args, call->at, call->folder, it->path)) return 0;
        return is_below(it->path) || (it->other[0] && is_below(it->other));
    }
}

static void quoted(const char *text) {
    fputc('"', log_file);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') fprintf(log_file, "\\%c", *text);
        else if ((unsigned char)*text < 32) fprintf(log_file, "\\u%04x", *text);
        else fputc(*text, log_file);
    }
    fputc('"', log_file);
}

/* The bytes that a call wrote, read back from the file. */
static void keep_bytes(struct thread *it, long long length) {
    char name[PATH_MAX], buffer[1 << 16];
    snprintf(name, sizeof name, "/proc/%d/fd/%d", it->tid, it->fd);
    int from = open(name, O_RDONLY);
    snprintf(name, sizeof name, "%s/%lu", bytes_folder, it->number);
    int to = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (from < 0 || to < 0) die(name);
    for (long long at = it->offset, end = at + length; at < end;) {
        size_t step = end - at < (long long)sizeof buffer ? end - at : (long long)sizeof buffer;
        ssize_t got = pread(from, buffer, step, at);
        if (got <= 0 || write(to, buffer, got) != got) break;
        at += got;
    }
    close(from);
    close(to);
}

static void record(struct thread *it, long long result) {
    if (bytes_folder && it->call->kind == WRITE && result > 0) keep_bytes(it, result);
    if (!log_file) return;
    fprintf(log_file, "{\"n\": %lu, \"pid\": %d, \"call\": \"%s\", \"path\": ", it->number, it->tid, it->call->name);
    quoted(it->path);
    if (it->other[0]) fprintf(log_file, ", \"to\": "), quoted(it->other);
    if (it->call->kind == OPEN) fprintf(log_file, ", \"flags\": %llu", (unsigned long long)open_flags(it->tid, it->call, it->args));
    if (!strcmp(it->call->name, "renameat2")) fprintf(log_file, ", \"flags\": %llu", (unsigned long long)it->args[4]);
    if (!strncmp(it->call->name, "symlink", 7) && !text(it->tid, it->args[0], it->other))
        fprintf(log_file, ", \"to\": "), quoted(it->other);
    if (it->call->kind == WRITE) fprintf(log_file, ", \"offset\": %lld", it->offset);
    if (!strcmp(it->call->name, "ftruncate") || !strcmp(it->call->name, "truncate"))
        fprintf(log_file, ", \"length\": %llu", (unsigned long long)it->args[1]);
    fprintf(log_file, ", \"result\": %lld}\n", result);
    fflush(log_file);
}

static void finish(int status) {
    if (log_file) fprintf(log_file, "{\"count\": %lu}\n", counted), fclose(log_file);
    exit(status);
}

static void kill_all(void) {
    for (size_t i = 0; i < thread_count; i++) kill(threads[i].tid, SIGKILL);
    int status;
    for (pid_t tid; (tid = waitpid(-1, &status, __WALL)) > 0 || errno == EINTR;)
        if (WIFSTOPPED(status)) kill(tid, SIGKILL); /* one that had just begun */
    finish(128 + SIGKILL);
}

#if defined(__x86_64__)
static void set_call(pid_t tid, long number) {
    ptrace(PTRACE_POKEUSER, tid, offsetof(struct user_regs_struct, orig_rax), number);
}
static void set_result(pid_t tid, long result) {
    ptrace(PTRACE_POKEUSER, tid, offsetof(struct user_regs_struct, rax), result);
}
#else
static void set_call(pid_t tid, long number) {
    int given = number;
    struct iovec in = {&given, sizeof given};
    ptrace(PTRACE_SETREGSET, tid, NT_ARM_SYSTEM_CALL, &in);
}
static void set_result(pid_t tid, long result) {
    struct user_regs_struct all;
    struct iovec in = {&all, sizeof all};
    ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &in);
    all.regs[0] = result;
    ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &in);
}
#endif

static void enter(struct thread *it, const struct ptrace_syscall_info *info) {
    it->call = NULL;
    for (size_t i = 0; i < COUNT(calls); i++)
        if (calls[i].number == (long)info->entry.nr) it->call = &calls[i];
    if (!it->call) return;
    for (int i = 0; i < 6; i++) it->args[i] = info->entry.args[i];
    if (!counts(it, it->call)) {
        it->call = NULL;
        return;
    }
    it->number = ++counted;
    if (it->call->kind == WRITE)
        it->offset = it->call->offset < 0 ? position(it->tid, it->fd) : (long long)it->args[it->call->offset];
    if (kill_at && it->number == kill_at) kill_all();
    it->fails = fail_at && (it->number == fail_at || (fail_on && it->number > fail_at));
    if (it->fails) set_call(it->tid, -1);
}

static void leave(struct thread *it, const struct ptrace_syscall_info *info) {
    if (!it->call) return;
    if (it->fails) set_result(it->tid, -fail_with);
    record(it, it->fails ? -fail_with : (long long)info->exit.rval);
    it->call = NULL;
}

#define OPTIONS (PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | \
                 PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC)

static pid_t start(char **command) {
    pid_t pid = fork();
    if (pid < 0) die("fork");
    if (!pid) {
        raise(SIGSTOP);
        execvp(command[0], command);
        perror(command[0]);
        _exit(127);
    }
    int status;
    if (waitpid(pid, &status, WUNTRACED) != pid || !WIFSTOPPED(status)) die("start");
    if (ptrace(PTRACE_SEIZE, pid, 0, OPTIONS)) kill(pid, SIGKILL), die("ptrace");
    kill(pid, SIGCONT);
    ptrace(PTRACE_INTERRUPT, pid, 0, 0);
    return pid;
}

/* All threads of a process that runs. */
static void attach(pid_t pid) {
    char name[64];
    snprintf(name, sizeof name, "/proc/%d/task", pid);
    DIR *tasks = opendir(name);
    if (!tasks) die(name);
    for (struct dirent *entry; (entry = readdir(tasks));) {
        pid_t tid = atoi(entry->d_name);
        if (tid <= 0) continue;
        if (ptrace(PTRACE_SEIZE, tid, 0, OPTIONS)) die("ptrace");
        ptrace(PTRACE_INTERRUPT, tid, 0, 0);
        thread(tid);
    }
    closedir(tasks);
}

static unsigned long number(const char *given) {
    char *end;
    unsigned long value = strtoul(given, &end, 10);
    if (!*given || *end) fprintf(stderr, "tracer: no number: %s\n", given), exit(125);
    return value;
}

int main(int argc, char **argv) {
    pid_t first = 0;
    int result = 0;
    for (int option; (option = getopt(argc, argv, "+r:c:l:d:k:f:e:op:")) != -1;) switch (option) {
        case 'r': if (root_count < COUNT(roots)) roots[root_count++] = optarg; break;
        case 'c': only = optarg; break;
        case 'l': if (!(log_file = fopen(optarg, "we"))) die(optarg); break;
        case 'd': bytes_folder = optarg; break;
        case 'k': kill_at = number(optarg); break;
        case 'f': fail_at = number(optarg); break;
        case 'e': fail_with = number(optarg); break;
        case 'o': fail_on = 1; break;
        case 'p': first = number(optarg); break;
        default: return 125;
    }
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* what its parent leaves is waited for, too */
    if (first) attach(first);
    else if (optind < argc) first = start(argv + optind), thread(first);
    else return fprintf(stderr, "tracer: no command\n"), 125;

    int status;
    for (pid_t tid; (tid = waitpid(-1, &status, __WALL)) > 0 || errno == EINTR;) {
        if (tid < 0) continue;
        if (WIFEXITED(status) || WIFSIGNALED(status)) {
            forget(tid);
            if (tid == first) result = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            continue;
        }
        struct thread *it = thread(tid);
        int signal = WSTOPSIG(status), event = status >> 16, given = 0;
        if (signal == (SIGTRAP | 0x80)) {
            struct ptrace_syscall_info info;
            if (ptrace(PTRACE_GET_SYSCALL_INFO, tid, sizeof info, &info) > 0) {
                if (info.op == PTRACE_SYSCALL_INFO_ENTRY) enter(it, &info);
                else if (info.op == PTRACE_SYSCALL_INFO_EXIT) leave(it, &info);
            }
        } else if (event == PTRACE_EVENT_STOP) {
            /* stopped by a signal, as by SIGSTOP: so it stays until SIGCONT */
            if (signal == SIGSTOP || signal == SIGTSTP || signal == SIGTTIN || signal == SIGTTOU) {
                ptrace(PTRACE_LISTEN, tid, 0, 0);
                continue;
            }
        } else if (!event) given = signal;
        ptrace(PTRACE_SYSCALL, tid, 0, given);
    }
    finish(result);
}

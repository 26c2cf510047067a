"""Runs one untrusted program: the file that `aipo_graph.tools.jail` starts with ``python -I -S -B``. Standard library only.

Two processes. The keeper reads the program from stdin, makes the namespaces, forks, and watches. Its child locks itself up, for
good, and runs the program in the same interpreter; what is left of stdin is the program's. The keeper's stderr is the report:
"ready" once the child is locked up, then how it ended. The program holds no descriptor of it.

The seccomp filter is written here, and not with libseccomp's bindings, since these want a system library that most machines lack.
It is a list of what is allowed, so that system calls of later kernels are refused as well.
"""

import builtins
import ctypes
import os
import resource
import signal
import struct
import sys
import time

MEMORY_EXIT = 71
"""Exit code of a program that ran out of memory."""
STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
TICK = 0.25
ENOSYS, EPERM, ENOTTY, EINVAL = 38, 1, 25, 22

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> its column in the tables, its name in a seccomp filter (linux/audit.h)."""
USED = {
    "unshare": (272, 97), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "mount_setattr": (442, 442),
    "capset": (126, 91), "prctl": (157, 167), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "clone": (56, 220), "clone3": (435, 435), "tgkill": (234, 131), "ioctl": (16, 29),
    "fcntl": (72, 25), "prlimit64": (302, 261),
}  # fmt: skip
ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, close 3 57, close_range 436 436, lseek 8 62,
open 2 -, openat 257 56, access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61,
stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, getcwd 79 17, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214, membarrier 324 283,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133, rt_sigtimedwait 128 137,
sigaltstack 131 132, pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103, restart_syscall 219 128,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, futex 202 98, set_robust_list 273 99, rseq 334 293,
sched_yield 24 124, sched_getaffinity 204 123, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165, getrlimit 97 163, uname 63 160, sysinfo 99 179, getrandom 318 278,
getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158,
getpgrp 111 -, getpgid 121 155, getsid 124 156, arch_prctl 158 -, set_tid_address 218 96, exit 60 93, exit_group 231 94
"""
"""System calls of a program that computes, with their numbers on x86-64 and aarch64. Files are Landlock's."""

_open_file = open
# Neither typing nor contextlib nor re is imported here: each would cost every run milliseconds.
_libc = ctypes.CDLL(None, use_errno=True)
_column, _architecture = MACHINES.get(os.uname().machine, (0, 0))


def main() -> None:
    if sys.platform != "linux" or not _architecture:
        raise OSError(ENOSYS, f"no system call numbers for {sys.platform} on {os.uname().machine}")
    layer, memory, idle, wall, length, parent = map(int, sys.argv[1:-1])
    cpu = float(sys.argv[-1])
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where the machine's memory ends, a program goes, and not whoever called
    except OSError:  # a container may have locked it
        pass
    null, proc = os.open("/dev/null", os.O_RDWR), os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    source = _read(length)
    if layer >= 2:
        _namespaces()
    _die_with(parent)
    _call("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER
    signals = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    keeper = os.getpid()
    child = os.fork()
    if child:
        _keep(child, proc, cpu, idle, wall)
        os._exit(0)
    # Whatever fails from here on to "ready" ends in a traceback on stderr, which the report then holds.
    _limits(layer, cpu, memory)
    if layer >= 1:
        _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    _die_with(keeper if layer < 2 else 0)  # the keeper is outside the PID namespace
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    os.closerange(3, null)
    os.closerange(null + 1, 1 << 20)
    if layer >= 1:
        _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        _landlock()
        _seccomp(_filter())
    os.write(2, b"ready\n")
    os.dup2(null, 2)
    os.close(null)
    _run(source)


def _read(length: int) -> bytes:
    # No buffer: what follows the program in the pipe is the program's own stdin.
    parts = []
    while length:
        part = os.read(0, min(length, 1 << 20))
        if not part:
            raise EOFError("the program was cut off")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _run(source: bytes) -> None:
    module = type(sys)("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    builtins.open = _open_standard
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        pass  # whatever its code: what was printed decides
    except MemoryError:
        os._exit(MEMORY_EXIT)


def _open_standard(file, *args, **kwargs):  # type: ignore[no-untyped-def]
    # These names lead through /proc, which is not there.
    return _open_file(STANDARD.get(file, file) if isinstance(file, str) else file, *args, **kwargs)


# The keeper


def _keep(child: int, proc: int, cpu: float, idle: int, wall: int) -> None:
    """Waits for the child's end, or ends it: asked to (SIGTERM), after ``cpu`` s of CPU time, ``idle`` s of sleep, or ``wall`` s in all."""
    os.close(0)
    os.close(1)
    # RLIMIT_CPU goes by what the kernel's tick happens to see: some per cent off on a busy machine, and blind to who naps at each tick.
    clock = ~child << 3 | 2  # clock_getcpuclockid(3)
    start, slept, reason = time.monotonic(), 0.0, "ended"
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        woken = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, TICK)
        if woken is None:
            slept += TICK if _asleep(child, proc) else 0.0
            reason = "slow" if time.clock_gettime(clock) > cpu else "idle" if slept > idle else "ended"
            if reason == "ended" and time.monotonic() - start > wall:
                reason = "starved"
        elif woken.si_signo == signal.SIGTERM:
            reason = "stopped"
        if reason != "ended":
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
    _sweep(proc)
    os.write(2, f"{reason} {status} {usage.ru_utime + usage.ru_stime:.6f}\n".encode())


def _asleep(pid: int, proc: int) -> bool:
    """Whether no thread of a process runs, waits for a CPU, or waits for a disk."""
    states = set()
    try:
        folder = _open(f"{pid}/task", proc)
        try:
            for thread in os.listdir(folder):
                with os.fdopen(_open(f"{thread}/stat", folder), "rb") as file:  # a thread's name, its own choice, need not be text
                    states.add(file.read().rpartition(b")")[2].split()[0])
        finally:
            os.close(folder)
    except OSError:  # one of them has just ended
        return False
    return not states & {b"R", b"D"}


def _sweep(proc: int) -> None:
    """Ends what a program without a seccomp filter has left behind: orphans become the keeper's children."""
    try:
        while True:
            with os.fdopen(_open(f"{os.getpid()}/task/{os.getpid()}/children", proc)) as file:
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            os.wait4(-1, 0)
    except OSError:  # none is left
        pass


def _open(path: str, folder: int) -> int:
    return os.open(path, os.O_RDONLY, dir_fd=folder)


# Locks


def _call(name: str, *args: int | bytes) -> int:
    numbers = [arg if isinstance(arg, bytes) else ctypes.c_long(arg) for arg in args]
    result: int = _libc.syscall(ctypes.c_long(USED[name][_column]), *numbers)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _die_with(parent: int) -> None:
    _call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _limits(layer: int, cpu: float, memory: int) -> None:
    limits = {
        resource.RLIMIT_CPU: 2 * int(cpu) + 2,  # the keeper is to be first
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 1,  # 0 still starts a handler of core dumps, where the machine has one
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if layer >= 2:  # elsewhere it counts all that the user runs, so it would fail honest threads; memory bounds those
        limits[resource.RLIMIT_NPROC] = 256
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _readable() -> list[str]:
    """The interpreter's and the system's libraries: all that a program may read."""
    prefixes = [sys.base_prefix, sys.base_exec_prefix, "/usr", "/usr/local", "/"]
    paths = dict.fromkeys(os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64"))
    return [path for path in paths if os.path.isdir(path)]


def _namespaces() -> None:
    """New user, mount, PID, network, IPC, UTS and cgroup namespaces; the file system is the readable folders and /dev/null, read-only."""
    user, group = os.geteuid(), os.getegid()
    _call("unshare", 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000 | 0x2000000)
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    bind, recursive, private, nosuid_nodev = 4096, 16384, 1 << 18, 2 | 4
    _call("mount", b"none", b"/", b"", recursive | private, 0)
    root = "/proc"  # a folder in which no interpreter lies
    sources = {path: os.open(path, os.O_PATH) for path in [*_readable(), "/dev/null"]}
    held = os.open("/proc/self/fd", os.O_PATH)
    _call("mount", b"none", root.encode(), b"tmpfs", nosuid_nodev, b"size=64k,nr_inodes=256,mode=755")
    for path, descriptor in sources.items():
        target = root + path
        os.makedirs(target if path != "/dev/null" else root + "/dev", exist_ok=True)
        if path == "/dev/null":
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
        os.fchdir(held)
        _call("mount", str(descriptor).encode(), target.encode(), b"", bind | recursive, 0)
        os.close(descriptor)
    os.close(held)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", 2)  # MNT_DETACH
    os.chdir("/")
    _call("mount_setattr", -100, b"/", 0x8000, struct.pack("4Q", 1 | 2, 0, 0, 0), 32)  # read-only, nosuid, recursively


def _landlock() -> None:
    version = _call("landlock_create_ruleset", 0, 0, 1)
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    handled = struct.pack("3Q", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = _call("landlock_create_ruleset", handled, 24 if version >= 6 else 16 if version >= 4 else 8, 0)
    read_file, read_folder, write_file = 1 << 2, 1 << 3, 1 << 1
    rules = dict.fromkeys(_readable(), read_file | read_folder) | {"/dev/null": read_file | write_file}
    for path, access in rules.items():
        folder = os.open(path, os.O_PATH)
        _call("landlock_add_rule", ruleset, 1, struct.pack("=Qi", access, folder), 0)
        os.close(folder)
    _call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _filter() -> list[tuple[int, int, int, int]]:
    """The seccomp program, as (code, jump if true, jump if false, operand)."""
    load, equal, mask, give = 0x20, 0x15, 0x54, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    number, architecture = 0, 4

    def low(argument: int) -> int:
        return 16 + 8 * argument

    def one_of(argument: int, values: list[int], otherwise: int) -> list[tuple[int, int, int, int]]:
        tests = [(equal, len(values) - at, 0, value) for at, value in enumerate(values)]
        return [(load, 0, 0, low(argument)), *tests, (give, 0, 0, refuse | otherwise), (give, 0, 0, allow)]

    rules = {
        # glibc falls back to clone, whose flags can be read: a thread that shares the memory, and that does not hold up its maker (VFORK),
        # who would look as if it waited for a disk.
        "clone3": [(give, 0, 0, refuse | ENOSYS)],
        "clone": [(load, 0, 0, low(0)), (mask, 0, 0, 0x14100), (equal, 1, 0, 0x10100), (give, 0, 0, refuse | EPERM), (give, 0, 0, allow)],
        # To itself, but not SIGKILL and SIGSTOP: an end by SIGKILL is to come from the kernel or from outside.
        "tgkill": [
            (load, 0, 0, low(0)), (equal, 1, 0, os.getpid()), (give, 0, 0, refuse | EPERM),
            (load, 0, 0, low(2)), (equal, 2, 0, 9), (equal, 1, 0, 19), (give, 0, 0, allow), (give, 0, 0, refuse | EPERM),
        ],
        "prctl": one_of(0, [15, 16, 0x53564D41], EPERM),  # names of threads and of memory
        "ioctl": one_of(1, [0x5401, 0x5413, 0x5450, 0x5451], ENOTTY),  # is it a terminal, its size; close on exec
        "fcntl": one_of(1, [0, 1, 2, 3, 4, 1030], EINVAL),  # no F_SETOWN: it sends signals
        # Reading limits, its own; RLIMIT_STACK may be set, as programs that recurse do.
        "prlimit64": [
            (load, 0, 0, low(0)), (equal, 1, 0, 0), (give, 0, 0, refuse | EPERM),
            (load, 0, 0, low(1)), (equal, 5, 0, resource.RLIMIT_STACK),
            (load, 0, 0, low(2)), (equal, 0, 2, 0), (load, 0, 0, low(2) + 4), (equal, 1, 0, 0), (give, 0, 0, refuse | EPERM),
            (give, 0, 0, allow),
        ],
    }  # fmt: skip
    program = [(load, 0, 0, architecture), (equal, 1, 0, _architecture), (give, 0, 0, kill), (load, 0, 0, number)]
    for entry in ALLOWED.split(","):
        allowed = entry.split()[1 + _column]
        if allowed != "-":
            program += [(equal, 0, 1, int(allowed)), (give, 0, 0, allow)]
    for name, rule in rules.items():
        program += [(equal, 0, len(rule), USED[name][_column]), *rule]
    return [*program, (give, 0, 0, refuse | ENOSYS)]


def _seccomp(program: list[tuple[int, int, int, int]]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    _call("prctl", 22, 2, struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)), 0, 0)


if __name__ == "__main__":
    main()

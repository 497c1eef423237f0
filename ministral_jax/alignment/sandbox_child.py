"""Runs one Python program for `sandbox.run`. A script of its own, started isolated: standard library only.

Reads a JSON request from its standard input and writes a JSON result to its standard output. Three processes:

launcher: makes the namespaces and waits; killed when the process that asked for the run dies.
supervisor: process 1 of the new PID namespace. Makes the file system read-only, starts the program, reads what it
    prints, watches time, processes and memory. When it ends, the kernel kills whatever is left in its namespace.
program: a fresh interpreter under resource limits, without capabilities, in an empty directory of bounded size.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time

OUTPUT_BYTES = 1 << 20
FILE_BYTES = 16 << 20
PROCESSES = 32
OPEN_FILES = 64
POLL_SECONDS = 0.02
HIDDEN = ("/run", "/dev/shm")  # sockets in the file system are not cut off with the network

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _PRIVATE = 0x1, 0x2, 0x4, 0x8, 0x1000, 0x4000 | 0x40000
_MOUNT_SETATTR, _RECURSIVE = 442, 0x8000
_PDEATHSIG, _SUBREAPER, _NO_NEW_PRIVS = 1, 36, 38

# Takes what it runs from file 3 and forgets the token before the program starts.
BOOT = """
import json, os
with open(3, "rb") as source:
    task = json.load(source)
space = {"__name__": task["name"]}
exec(compile(task["program"], "<program>", "exec"), space)
if task["check"] is not None:
    exec(compile(task["check"], "<test>", "exec"), space)
    os.write(4, task["token"].encode())
"""

libc = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "namespace")]


def call(what, result):
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source, target, kind, flags, options=None):
    call(f"mount {target}", libc.mount(*(x and x.encode() for x in (source, target, kind)), flags, options))


def mount_attributes(path, flags, add, remove):
    attributes = MountAttributes(add, remove, 0, 0)
    result = libc.syscall(_MOUNT_SETATTR, -100, path.encode(), flags, ctypes.byref(attributes), 32)
    call(f"mount_setattr {path}", result)


def enter_namespaces():
    uid, gid = os.getuid(), os.getgid()
    call("unshare", libc.unshare(_NEWNS | _NEWIPC | _NEWUSER | _NEWPID | _NEWNET))
    # Not root inside, whoever starts it: an exec then leaves no capability.
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def close_file_system(work):
    """All of it read-only and without devices, but for `work` (empty, bounded) and /dev/null."""
    mount(None, "/", None, _PRIVATE)
    mount("/dev/null", "/dev/null", None, _BIND)
    for path in HIDDEN:
        if os.path.isdir(path) and not os.path.islink(path):
            mount("tmpfs", path, "tmpfs", _RDONLY | _NOSUID | _NODEV)
    mount("tmpfs", work, "tmpfs", _NOSUID | _NODEV, f"size={FILE_BYTES},nr_inodes=1000,mode=700".encode())
    mount_attributes("/", _RECURSIVE, _RDONLY | _NOSUID | _NODEV, 0)
    mount_attributes(work, 0, 0, _RDONLY)
    mount_attributes("/dev/null", 0, 0, _RDONLY | _NODEV)
    # Last, so that what belongs to other processes is out of sight and kernel settings cannot be written.
    mount("proc", "/proc", "proc", _RDONLY | _NOSUID | _NODEV | _NOEXEC)


def memory_file(content):
    file = os.memfd_create("input")
    with open(os.dup(file), "wb") as stream:
        stream.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def start_program(request, output, report):
    """The program's process id. `output` becomes its standard output, `report` its file 4."""
    keys = ("name", "program", "check", "token")
    task = memory_file(json.dumps({key: request[key] for key in keys}).encode())
    stdin = memory_file(request["stdin"].encode())
    pid = os.fork()
    if pid:
        os.close(task)
        os.close(stdin)
        return pid
    try:
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        null = os.open("/dev/null", os.O_WRONLY)
        moved = [fcntl.fcntl(file, fcntl.F_DUPFD, 10) for file in (stdin, output, null, task, report)]
        for number, file in enumerate(moved):
            os.dup2(file, number)
        os.closerange(5, 4096)
        seconds, memory = int(request["seconds"]) + 2, request["memory_mb"] << 20
        limits = {"CPU": seconds, "AS": memory, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0}
        call("prctl", libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
        for name, limit in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
        environment = {"HOME": os.getcwd(), "TMPDIR": os.getcwd(), "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", BOOT]
        os.execve(sys.executable, command, environment)
    finally:
        os._exit(125)


def usage():
    """Threads and bytes of memory of their own of all processes that this one sees, itself left out."""
    threads = memory = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                threads += len(os.listdir(f"/proc/{name}/task"))
                with open(f"/proc/{name}/statm") as file:
                    _, resident, shared = map(int, file.read().split()[:3])
                memory += (resident - shared) * resource.getpagesize()
            except OSError:
                continue  # it has just ended
            if threads > PROCESSES:
                break
    return threads, memory


def watch(pid, output, request, alone):
    """How the program ended, and what it printed: `exit`, `signal`, `time`, `processes`, `memory` or `output`."""
    printed, closed = bytearray(), False
    deadline = time.monotonic() + request["seconds"]
    next_look = 0.0

    def read():
        nonlocal closed
        while not closed and len(printed) <= OUTPUT_BYTES and select.select([output], [], [], 0)[0]:
            some = os.read(output, 65536)
            printed.extend(some)
            closed = not some

    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        read()
        if len(printed) > OUTPUT_BYTES:
            return "output", 0, printed
        if done:
            code = os.waitstatus_to_exitcode(status)
            return ("exit" if code >= 0 else "signal"), code, printed
        now = time.monotonic()
        if now > deadline:
            return "time", 0, printed
        if alone and now > next_look:
            threads, memory = usage()
            if threads > PROCESSES or memory > request["memory_mb"] << 20:
                return ("processes" if threads > PROCESSES else "memory"), 0, printed
            next_look = now + POLL_SECONDS
        while alone and orphan_reaped(pid):
            pass
        if closed:
            time.sleep(0.002)
        else:
            select.select([output], [], [], 0.002)


def orphan_reaped(program):
    """Collects one ended process that is not the program."""
    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None or found.si_pid in (0, program):
        return False
    os.waitpid(found.si_pid, 0)
    return True


def kill_descendants(group):
    """Without a namespace: the program's group, and what left it, which as orphans become children of this process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while True:
        try:
            os.waitpid(-1, os.WNOHANG)
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = file.read().split()
        except (ChildProcessError, FileNotFoundError):
            return
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        time.sleep(0.001)


def supervise(request, answer):
    output, program_output = os.pipe()
    report, program_report = os.pipe()
    os.chdir(request["work"])
    pid = start_program(request, program_output, program_report)
    os.close(program_output)
    os.close(program_report)
    ended, code, printed = watch(pid, output, request, request["isolation"] == "namespaces")
    if request["isolation"] == "none":
        kill_descendants(pid)
    said = os.read(report, 1024) if select.select([report], [], [], 0)[0] else b""
    result = {
        "ended": ended,
        "code": code,
        "output": printed[:OUTPUT_BYTES].decode(errors="replace"),
        "checked": ended == "exit" and said == request["token"].encode(),
    }
    with open(answer, "w") as stream:
        json.dump(result, stream)


def main():
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    answer = os.dup(1)
    request = json.load(sys.stdin.buffer)
    if os.getppid() != request["parent"]:
        return
    if request["isolation"] == "none":
        libc.prctl(_SUBREAPER, 1, 0, 0, 0)
        supervise(request, answer)
        return
    try:
        enter_namespaces()
    except OSError as error:
        os.write(answer, json.dumps({"refused": str(error)}).encode())
        return
    pid = os.fork()
    if pid == 0:
        try:
            libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            try:
                close_file_system(request["work"])
            except OSError as error:
                os.write(answer, json.dumps({"refused": str(error)}).encode())
                return
            supervise(request, answer)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()

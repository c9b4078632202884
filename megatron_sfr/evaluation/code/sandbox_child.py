"""Runs one Python program in a sandbox. A separate program, started by sandbox.py, that imports nothing of the package.

There are two kinds. `namespaces`: new network (without interfaces), process, mount and, without root, user namespaces.
The file system is a read-only view of the system's libraries and Python, with an empty in-memory working folder; as
root the program runs under an unused user id. `audit`: only a hook in the interpreter that refuses sockets, processes
and writing outside the folder, which stops accidents, not attackers. Both limit time, memory, files and threads, and
install the seccomp filter of system_calls.py, which keeps the program one process, so its memory limit covers all of
it.
"""

import ctypes
import json
import os
import resource
import runpy
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 1 << 14, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_READ_ONLY, ATTR_NOSUID = 442, -100, 0x8000, 1, 2  # Linux 5.12
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
INODES = 4096  # files in the working folder; each costs kernel memory that its size limit does not count
NAMESPACES = os.CLONE_NEWNET | os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWIPC | os.CLONE_NEWUTS
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
WORK = "/box"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"),
    "1",  # an arena reserves 64 MiB of address space
)
RUN = """
import runpy, sys
sys.path = ['.', *sys.path, {site!r}]
try:
    runpy.run_path('main.py', None, {name!r})
except SystemExit:
    if not {may_exit!r}:
        raise
"""
REFUSED = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "ctypes.", "pty.")
WRITING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    checked(libc.mount(*arguments, flags, None if data is None else data.encode()), f"mount {target}")


def build_root(spec: dict[str, Any]) -> None:
    """Mounts a tmpfs root with the system and Python bound read-only; /box is an empty in-memory folder."""
    box = spec["box"]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", box, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path in (*SYSTEM, *spec["python"][1:]):
        target = box + path
        if os.path.exists(path) and not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if os.path.islink(path):  # /lib -> usr/lib
                os.symlink(os.readlink(path), target)
                continue
            if os.path.isdir(path):
                os.mkdir(target)
            else:
                os.close(os.open(target, os.O_CREAT))
            mount(path, target, None, MS_BIND | MS_REC)
    os.mkdir(box + WORK)
    attributes = struct.pack("QQQQ", ATTR_READ_ONLY | ATTR_NOSUID, 0, 0, 0)
    checked(libc.syscall(MOUNT_SETATTR, AT_FDCWD, box.encode(), AT_RECURSIVE, attributes, 32), "mount_setattr")
    mount("tmpfs", box + WORK, "tmpfs", MS_NOSUID | MS_NODEV, f"size={spec['disk']},nr_inodes={INODES},mode=777")


def limit(spec: dict[str, Any]) -> None:
    limits = {"CPU": spec["cpu"], "AS": spec["memory"], "FSIZE": spec["file_size"], "NPROC": spec["threads"]}
    for name, value in (limits | {"CORE": 0, "NOFILE": 64}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def refuse_system_calls(code: bytes) -> None:
    """Installs a seccomp filter (an array of struct sock_filter) for this process and everything it executes."""
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(program), 0, 0), "seccomp")


def in_namespaces(spec: dict[str, Any], mark: int) -> int:
    """The exit status of the program; everything it started dies with the first process of its namespace."""
    user, group = os.getuid(), os.getgid()
    stranger = 1_000_000_000 + os.getpid()  # RLIMIT_NPROC counts a user's processes and does not limit root's
    os.unshare(NAMESPACES | (0 if user == 0 else os.CLONE_NEWUSER))
    end_with(spec["parent"])
    if user != 0:
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    build_root(spec)

    def program() -> int:
        os.chroot(spec["box"])
        os.chdir(WORK)
        write_source(spec)
        if user == 0:
            os.setgroups([])
            os.setgid(stranger)
            os.setuid(stranger)
        refuse_system_calls(bytes.fromhex(spec["filter"]))
        limit(spec)
        python, _, site = spec["python"]
        if not os.access(python, os.X_OK):
            raise FileNotFoundError(python)
        run = RUN.format(site=site, name=spec["name"], may_exit=spec["may_exit"])
        os.write(mark, b"namespaces\n")  # the sandbox is complete
        os.execve(python, [python, "-I", "-S", "-B", "-c", run], dict(os.environ))

    def first() -> int:
        checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
        return waited(program)

    return waited(first)


def waited(work: Callable[[], int]) -> int:
    """The exit status of a child that runs `work`, or 128 + signal if a signal ended it. Also reaps orphans."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        except BaseException as error:
            os.write(2, f"sandbox: {error!r}\n".encode())
            os._exit(97)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def end_with(parent: int) -> None:
    """Kills this process when its parent, which enforces the time limit, ends. See runtime/lifetime.py."""
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    if os.getppid() != parent:
        os._exit(1)


def under_audit(spec: dict[str, Any], mark: int) -> int:
    end_with(spec["parent"])
    os.chdir(spec["box"])
    write_source(spec)
    refuse_system_calls(bytes.fromhex(spec["filter"]))
    os.write(mark, b"audit\n")
    limit(spec)
    here = os.path.realpath(".") + os.sep

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in WRITING or (event == "open" and (arguments[2] or 0) & OPENED_TO_WRITE)
        paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes)] if writes else []
        outside = [path for path in paths if not (os.path.realpath(path) + os.sep).startswith(here)]
        if event.startswith(REFUSED) or outside:
            raise PermissionError(f"{event} is not allowed here")

    sys.path = [here, *sys.path, spec["python"][2]]
    sys.addaudithook(refuse)
    try:
        runpy.run_path("main.py", None, spec["name"])
    except SystemExit:
        if not spec["may_exit"]:
            raise
    return 0


def write_source(spec: dict[str, Any]) -> None:
    with open("main.py", "w", encoding="utf-8", errors="surrogatepass") as file:  # lone surrogates will not compile
        file.write(spec["source"])


def main() -> int:
    with open(int(sys.argv[1]), encoding="utf-8") as file:
        spec = json.load(file)
    os.environ |= ENVIRONMENT
    run = in_namespaces if spec["isolation"] == "namespaces" else under_audit
    return run(spec, int(sys.argv[2]))


if __name__ == "__main__":
    sys.exit(main())

"""The sandbox's seccomp filter, which refuses system calls that would bypass a program's memory limit.

RLIMIT_AS limits one process. It bounds a program only if the program stays one process and owns no memory outside its
address space. So the filter refuses new processes (threads are allowed), System V and POSIX IPC, files in memory and
the calls that keep pages in a pipe or a ring. Calls are numbered as in Linux's unistd.h.
"""

import errno
import platform
import struct

THREAD = 0x10000  # CLONE_THREAD in the first argument of clone
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_*
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes on 32-bit words
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16  # byte offsets in struct seccomp_data; ARGUMENT: low half of the first
X32 = 0x40000000  # set in the numbers of x86's second table of calls

# fork and vfork exist on x86 only. Filters of other calls would need arguments that BPF cannot read (pointers).
CALLS = {
    "x86_64": (
        0xC000003E,
        {"fork": 57, "vfork": 58, "clone": 56, "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64, "mq_open": 240}
        | {"add_key": 248, "request_key": 249, "keyctl": 250, "memfd_create": 319, "vmsplice": 278, "unshare": 272}
        | {"setns": 308, "perf_event_open": 298, "bpf": 321, "userfaultfd": 323},
    ),
    "aarch64": (
        0xC00000B7,
        {"clone": 220, "shmget": 194, "shmat": 196, "msgget": 186, "semget": 190, "mq_open": 180, "add_key": 217}
        | {"request_key": 218, "keyctl": 219, "memfd_create": 279, "vmsplice": 75, "unshare": 97, "setns": 268}
        | {"perf_event_open": 241, "bpf": 280, "userfaultfd": 282},
    ),
}
SHARED = {"io_uring_setup": 425, "memfd_secret": 447}  # calls since Linux 5.1 have one number everywhere
CLONE3 = 435


def seccomp_filter(machine: str = "") -> bytes:
    """The filter as an array of struct sock_filter, for prctl(PR_SET_SECCOMP). Raises ValueError for unknown machines.

    Refused calls fail with EPERM. clone3 hides its flags behind a pointer: it fails with ENOSYS, and the C library
    falls back to clone.
    """
    machine = machine or platform.machine()
    if machine not in CALLS:
        raise ValueError(f"the sandbox knows the system calls of {' and '.join(CALLS)}, not of {machine}")
    architecture, calls = CALLS[machine]
    refused, unknown = ERROR | errno.EPERM, ERROR | errno.ENOSYS
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, refused)]
    for name, number in (calls | SHARED).items():
        if name != "clone":
            program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, refused)]
    program += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, unknown)]
    program += [(EQUAL, 0, 3, calls["clone"]), (LOAD, 0, 0, ARGUMENT), (ANY_BIT, 1, 0, THREAD), (RETURN, 0, 0, refused)]
    program += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)

"""Filter of system calls that an evaluator has no use for, as the kernel's classic BPF.

Namespaces and mounts already keep a program in. The filter takes away what kernel faults are mostly found by: making
namespaces and mounts of one's own, tracing, keys, BPF, io_uring, and families of sockets that no namespace confines.

Linux on x86-64 and AArch64 only. This file stands alone, as `launcher.py` does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

#: prctl(2).
PR_SET_SECCOMP: Final = 22
SECCOMP_MODE_FILTER: Final = 2
#: Architecture as the kernel names it (AUDIT_ARCH_…), by machine.
ARCHITECTURES: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
#: Numbers by name, on x86-64 and on AArch64.
REFUSED: Final = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "request_key": (249, 218),
    "setns": (308, 268),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_SOCKET: Final = (41, 198)
#: Families of sockets that namespaces confine: AF_UNIX, AF_INET, AF_INET6.
_FAMILIES: Final = (1, 2, 10)
#: CLONE_NEWTIME is a flag of unshare alone; the others: mounts, control groups, names, IPC, users, processes, network.
_NEW_NAMESPACES: Final = 0x7E02_0000
#: System calls of the x32 ABI have this bit, and the numbers of others below it.
_X32: Final = 0x4000_0000

_LOAD: Final = 0x20
_JUMP_EQUAL: Final = 0x15
_JUMP_AT_LEAST: Final = 0x35
_JUMP_SET: Final = 0x45
_RETURN: Final = 0x06
_ALLOW: Final = 0x7FFF_0000
_KILL: Final = 0x8000_0000
_ERRNO: Final = 0x0005_0000
#: Offsets in `struct seccomp_data`: number, architecture, the low half of the first argument.
_NUMBER, _ARCHITECTURE, _FIRST = 0, 4, 16


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def supported() -> bool:
    """Return whether this machine's system calls are known."""
    return os.uname().machine in ARCHITECTURES


def program(machine: str) -> bytes:
    """Return the filter for a machine, `x86_64` or `aarch64`."""
    column = list(ARCHITECTURES).index(machine)
    code = [
        _op(_LOAD, _ARCHITECTURE),
        _op(_JUMP_EQUAL, ARCHITECTURES[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
        _op(_JUMP_AT_LEAST, _X32, 0, 1),
        _op(_RETURN, _KILL),
    ]
    for numbers in REFUSED.values():
        code += [_op(_JUMP_EQUAL, numbers[column], 0, 1), _op(_RETURN, _ERRNO | errno.EPERM)]
    # Its flags lie in memory, where no filter sees them. Libraries fall back to clone.
    code += [_op(_JUMP_EQUAL, _CLONE3[column], 0, 1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    code += [
        _op(_JUMP_EQUAL, _CLONE[column], 0, 4),
        _op(_LOAD, _FIRST),
        _op(_JUMP_SET, _NEW_NAMESPACES, 0, 1),
        _op(_RETURN, _ERRNO | errno.EPERM),
        _op(_RETURN, _ALLOW),
        _op(_JUMP_EQUAL, _SOCKET[column], 0, len(_FAMILIES) + 2),
        _op(_LOAD, _FIRST),
    ]
    for left, family in reversed(list(enumerate(reversed(_FAMILIES)))):
        code.append(_op(_JUMP_EQUAL, family, left + 1, 0))
    code += [_op(_RETURN, _ERRNO | errno.EAFNOSUPPORT), _op(_RETURN, _ALLOW)]
    return b"".join(code)


def install() -> None:
    """Filter this process and all that it becomes and starts, once it can gain no privileges. Raises `OSError`."""
    code = program(os.uname().machine)
    held = ctypes.create_string_buffer(code, len(code))
    filter_ = _Program(len(code) // 8, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the filter of system calls was refused")


def _op(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)

"""Runs a program under a seccomp profile of the OCI's form: `python seccomp.py PROFILE COMMAND …`.

What a container's runtime does, through libseccomp: no new privileges, the profile, then exec. For
a test, and to try a whole service by hand without a container.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

_PR_SET_NO_NEW_PRIVS = 38
_ACT_ALLOW, _ACT_ERRNO = 0x7FFF0000, 0x00050000
_COMPARISONS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
_UNKNOWN = -1


class _Condition(ctypes.Structure):
    """`struct scmp_arg_cmp` of seccomp.h."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def library() -> ctypes.CDLL | None:
    """Return libseccomp, None where it is not installed."""
    try:
        found = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    found.seccomp_init.restype = ctypes.c_void_p
    found.seccomp_init.argtypes = [ctypes.c_uint32]
    found.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    found.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Condition),
    ]
    found.seccomp_load.argtypes = [ctypes.c_void_p]
    return found


def load(profile: dict[str, Any]) -> None:
    """Put this process, and all that it starts, under the profile. It cannot be taken back."""
    seccomp = library()
    if seccomp is None:
        raise RuntimeError("libseccomp is not installed")
    context = seccomp.seccomp_init(_action(profile, "defaultAction", "defaultErrnoRet"))
    for rule in profile["syscalls"]:
        action = _action(rule, "action", "errnoRet")
        conditions = [_condition(argument) for argument in rule.get("args", ())]
        array = (_Condition * len(conditions))(*conditions)
        for name in rule["names"]:
            number = seccomp.seccomp_syscall_resolve_name(name.encode())
            if number == _UNKNOWN:  # newer than the library: no such call can be made by name
                continue
            failed = seccomp.seccomp_rule_add_array(context, action, number, len(conditions), array)
            assert not failed, (name, failed)
    assert not ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    assert not seccomp.seccomp_load(context)


def _action(rule: dict[str, Any], key: str, number: str) -> int:
    return _ACT_ALLOW if rule[key] == "SCMP_ACT_ALLOW" else _ACT_ERRNO | rule[number]


def _condition(argument: dict[str, Any]) -> _Condition:
    operator = _COMPARISONS[argument["op"].removeprefix("SCMP_CMP_")]
    return _Condition(argument["index"], operator, argument["value"], argument.get("valueTwo", 0))


def main() -> None:
    """Load, then become the command."""
    load(json.loads(Path(sys.argv[1]).read_text()))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()

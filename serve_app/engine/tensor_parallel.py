"""One engine over several cards of a machine: rank 0 schedules and samples, all ranks compute.

::

    client ── worker (rank 0): scheduler, sampler, ParallelNetwork ─┬─ socket: what to run
                                                                    ├─ broadcast: a step's inputs
              other ranks: tensor_parallel_rank, one process each ──┘  sums over ranks, per layer

The other ranks die with rank 0. A rank that dies ends the engine: its part of the weights is gone.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from serve_app.config.model_source import ModelSource
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import ConfigError
from serve_app.engine.graphs import StepGraphs, create_graphs
from serve_app.engine.native import NativeEngine
from serve_app.engine.tensor_parallel_group import (
    RankLostError,
    join,
    meeting_point,
    rank_device,
)
from serve_app.engine.tensor_parallel_inputs import describe, pack_inputs
from serve_app.engine.tensor_parallel_link import Inbox
from serve_app.engine.wire import unpack_error
from serve_app.engine.worker import ClientGone, Connection
from serve_app.models.interface import AttentionMetadata
from serve_app.models.llama import LlamaNetwork
from serve_app.models.loading.loader import load_model
from serve_app.models.loading.progress import LoadProgress
from serve_app.models.parallel import Shard

_END_TIMEOUT_S = 5.0


class OtherRanks:
    """The processes of ranks 1 and up, and a socket to each.

    Raises RankLostError from any call once one of them has died.
    """

    def __init__(self, num_ranks: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._connections: list[Connection] = []
        self._inboxes: list[Inbox] = []
        for _ in range(1, num_ranks):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-m", "serve_app.engine.tensor_parallel_rank"]
            with theirs:
                fd = theirs.fileno()
                process = subprocess.Popen(
                    [*command, str(fd)], pass_fds=(fd,), stdin=subprocess.DEVNULL
                )
            self._processes.append(process)
            self._sockets.append(ours)
            self._connections.append(Connection(ours))
            self._inboxes.append(Inbox(self._connections[-1]))

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, by rank."""
        return tuple(process.pid for process in self._processes)

    def configure(self, port: int, model: ModelSection, engine: EngineSection, device: str) -> None:
        """Send each rank what to load and where to meet."""
        sections = (model.model_dump(mode="json"), engine.model_dump(mode="json"))
        for rank, connection in enumerate(self._connections, start=1):
            self._sent(connection, "config", rank, port, device, *sections)

    def send(self, *parts: Any) -> None:
        """Send the same frame to every rank."""
        self.check()
        for connection in self._connections:
            self._sent(connection, *parts)

    def check(self) -> None:
        """Raise RankLostError where a rank has died."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise RankLostError(rank)

    def wait_for(self, kind: str) -> None:
        """Wait until every rank has said `kind`. Raises the error that a rank reports instead."""
        for rank, inbox in enumerate(self._inboxes, start=1):
            try:
                told, *args = inbox.next()
            except ClientGone:
                raise RankLostError(rank) from None
            if told == "failed":
                raise unpack_error(args[0])
            assert told == kind, f"rank {rank} said {told!r} instead of {kind!r}"

    def end(self) -> None:
        """Ask the ranks to end, and kill those that do not within 5 seconds."""
        for connection in self._connections:
            try:
                connection.send("close")
            except ClientGone:
                continue
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for ours in self._sockets:
            ours.close()

    def _sent(self, connection: Connection, *parts: Any) -> None:
        try:
            connection.send(*parts)
        except ClientGone:
            raise RankLostError(1 + self._connections.index(connection)) from None


class ParallelNetwork:
    """A `CausalLM` of which this process computes rank 0's part; logits are rank 0's alone."""

    def __init__(self, network: LlamaNetwork, ranks: OtherRanks) -> None:
        self.vocab_size = network.vocab_size
        self.max_position = network.max_position
        self.kv_spec = network.kv_spec
        self.device = network.device
        self.num_recorded = 0
        self._network = network
        self._ranks = ranks

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> torch.Tensor:
        """As of `CausalLM`; each rank allocates one for its own heads."""
        self._ranks.send("allocate", num_blocks, block_size)
        cache = self._network.allocate_kv_cache(num_blocks, block_size)
        self._ranks.wait_for("allocated")
        return cache

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As of `CausalLM`. Raises RankLostError: the ranks are no longer in step.

        While this process records its stream the others record too, and run nothing.
        """
        is_recording = self._is_recording()
        self.num_recorded += is_recording
        self._ranks.send(
            "record" if is_recording else "forward", describe(input_ids.shape[0], metadata)
        )
        try:
            dist.broadcast(pack_inputs(input_ids, positions, metadata), src=0)
            return self._network.forward(input_ids, positions, kv_cache, metadata)
        except Exception as error:
            self._ranks.check()
            raise RankLostError(0) from error

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] → float32 logits [S, vocab]."""
        return self._network.compute_logits(hidden)

    def _is_recording(self) -> bool:
        if self.device.type == "cpu":
            return False
        module = torch.get_device_module(self.device)
        return bool(module.is_current_stream_capturing())


class ParallelGraphs:
    """`StepGraphs` of rank 0: a replay of a forward pass is told to the other ranks first."""

    is_capturing = True

    def __init__(self, graphs: StepGraphs, network: ParallelNetwork, ranks: OtherRanks) -> None:
        self._graphs = graphs
        self._network = network
        self._ranks = ranks

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """As of `StepGraphs`; a function without a forward pass concerns rank 0 alone."""
        number = self._network.num_recorded
        replay = self._graphs.capture(function)
        if self._network.num_recorded == number:
            return replay

        def replay_everywhere() -> torch.Tensor:
            self._ranks.send("replay", number)
            return replay()

        return replay_everywhere


def create_parallel_engine(
    source: ModelSource,
    model: ModelSection,
    section: EngineSection,
    device: torch.device,
    tell: Callable[[str], None],
) -> NativeEngine:
    """Load the model over `section.tensor_parallel_size` cards and start its engine.

    Raises ConfigError where the cards are not there or the model does not divide.
    """
    num_ranks = section.tensor_parallel_size
    _check_cards(device, section)
    tell(f"starting {num_ranks} ranks")
    started = time.perf_counter()
    ranks = OtherRanks(num_ranks)
    try:
        store = meeting_point(num_ranks)
        ranks.configure(store.port, model, section, device.type)
        ranks.wait_for("started")
        reduce = join(store, 0, num_ranks, device)
        tell("loading weights")
        loaded = load_model(
            source.path,
            device=rank_device(device.type, 0),
            dtype=section.dtype,
            weight_format=section.weight_format,
            progress=LoadProgress(tell),
            shard=Shard(0, num_ranks),
        )
        ranks.wait_for("loaded")
        network = loaded.network
        assert isinstance(network, LlamaNetwork)
        network.reduce_over_ranks(reduce)
        load_s = time.perf_counter() - started
        parallel = ParallelNetwork(network, ranks)
        loaded.network = parallel
        graphs = create_graphs(device, section.capture_graphs)
        if graphs.is_capturing:
            graphs = ParallelGraphs(graphs, parallel, ranks)
        loaded.name = source.name
        tell("warm-up")
        return NativeEngine(
            loaded,
            _section_of_a_rank(section, device),
            max_model_len=model.max_model_len,
            load_s=load_s,
            on_progress=tell,
            graphs=graphs,
            on_close=lambda: _leave(ranks),
        )
    except BaseException:
        _leave(ranks)
        raise


def _leave(ranks: OtherRanks) -> None:
    ranks.end()
    if dist.is_initialized():
        dist.destroy_process_group()


def _section_of_a_rank(section: EngineSection, device: torch.device) -> EngineSection:
    """On CPU all ranks take their caches from the same memory."""
    if device.type != "cpu":
        return section
    share = section.kv_cache_memory_fraction / section.tensor_parallel_size
    return section.model_copy(update={"kv_cache_memory_fraction": share})


def _check_cards(device: torch.device, section: EngineSection) -> None:
    num_ranks = section.tensor_parallel_size
    if device.type == "cpu":
        return
    if device.type == "xpu" and section.capture_graphs:
        raise ConfigError(
            "engine.capture_graphs: xpu cannot capture sums over several cards; set it to false",
            param="engine.capture_graphs",
        )
    found = torch.get_device_module(device).device_count()
    if found < num_ranks:
        raise ConfigError(
            f"engine.tensor_parallel_size: {num_ranks} cards are asked for, but this engine sees"
            f" {found}; set model_replica.num_cards: {num_ranks}, or lower tensor_parallel_size",
            param="engine.tensor_parallel_size",
        )

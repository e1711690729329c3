"""A micro-step as one CUDA graph: what the host asks of the device is recorded once, and then asked for by one call.

The device runs the very same kernels; what is saved is the host's time, 2,000 launches of it for every micro-step. With
one rank the graph holds all of forward, backward, AdamW and the teacher's average; with several it holds forward and
backward, and the ranks' gradients are added up, and the weights updated, beside it.

A graph reads and writes the memory that it was recorded with, so the inputs are copied to where it reads them, and what
it gives is copied from where it writes. Numbers that change from update to update lie on the device (learning rates,
the teacher's momentum, α, the update's number); DeepSpeed's own counters are advanced by hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasthpm import ranks
from fasthpm.errors import note_once
from fasthpm.speed.clock import Region, Stopwatch
from fasthpm.speed.compiled import reason

OVERRIDE = "set_override_stale_capture_stream"  # of torch.autograd.graph
WARNS = "set_warn_on_accumulate_grad_stream_mismatch"  # of the same
WARM_UP = 2  # micro-steps of a kind before it is recorded: they compile, load kernels and fill caches

MicroStep = Callable[..., Any]  # (images, ids, update, alpha, scores) -> what the engine's module gives, all applied
Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # function -> how to run it again, its result


def micro_step(asked: str, engine: Any, stopwatch: Stopwatch) -> MicroStep:
    """What does a micro-step of a DeepSpeed engine, as one call whatever way it takes.

    - `asked`: a recipe's `cuda_graph`; `stopwatch`: what the engine's module measures itself with
    """
    eager = Eager(engine)
    if asked == "off" or (asked == "auto" and engine.device.type == "cpu"):
        return eager
    if problem := refusal(engine):
        note_once(f"no CUDA graph ({problem}): updates run eagerly")
        return eager
    return Graphs(eager, stopwatch, CudaRecorder())


def refusal(engine: Any) -> str:
    """Why updates of this engine cannot be a graph; empty if they can."""
    if engine.device.type != "cuda":
        return "there is no GPU"
    if engine.zero_optimization_stage() != 1:
        return f"ZeRO stage {engine.zero_optimization_stage()} is not recorded, --deepspeed_config zero1_bf16 is"
    if ranks.decay_moves(engine):
        return "the weight decay changes from update to update, and a recording would keep it"
    if not ranks.updates_on_device(engine):
        return "updates in float32, and those with --on_nonfinite skip, ask the host"
    return ""


@contextmanager
def recordable(device: torch.device) -> Iterator[None]:
    """Build an engine inside: its gradients then arrive on the stream that graphs are recorded on.

    A newer torch lets them follow a recording wherever they were going to arrive, and needs no such stream.
    """
    if device.type != "cuda" or hasattr(torch.autograd.graph, OVERRIDE):
        yield
        return
    stream = torch.cuda.Stream(device)
    torch.cuda.graph.default_capture_stream = stream
    getattr(torch.autograd.graph, WARNS, bool)(False)  # that it is another stream than the other work's
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


class Eager:
    """A micro-step as it is written: forward, backward, and the update where it is due."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __call__(self, *inputs: Tensor | None) -> Any:
        output = self.engine(*inputs)
        self.engine.backward(output.loss)
        self.engine.step()
        return output


@dataclass
class Graph:
    """One recorded micro-step."""

    run: Callable[[], None]
    output: Any  # where it writes what the module gives
    norm: Any  # where it writes the gradient's norm, if it ends an update
    regions: list[Region]


class Graphs:
    """Micro-steps by graphs, one of those that end an update and one of the others; new ones when the masks' plan
    changes, which it does with the first maps.

    - `eager`: what a graph is recorded of, and what runs before and wherever it cannot be
    - `record`: makes a graph of a function without running anything
    """

    def __init__(self, eager: Eager, stopwatch: Stopwatch, record: Record) -> None:
        self.problem = ""  # why there are no graphs any more
        self._eager, self._engine, self._stopwatch, self._record = eager, eager.engine, stopwatch, record
        self._whole = not self._engine.enable_backward_allreduce  # several ranks have to meet within a micro-step
        self._kind: list[Any] = []  # shapes of the inputs
        self._inputs: list[Tensor | None] = []  # where the graphs read them
        self._graphs: dict[bool, Graph] = {}
        self._seen = {True: 0, False: 0}

    def __call__(self, *inputs: Tensor | None) -> Any:
        if self.problem:
            return self._eager(*inputs)
        kind = [given if given is None else (given.shape, given.dtype) for given in inputs]
        if kind != self._kind:
            self._forget()  # first, and its memory with it: what follows needs as much again
            self._kind = kind
        ending = ranks.ends_update(self._engine)
        if ending not in self._graphs:
            if self._seen[ending] < WARM_UP:
                self._seen[ending] += 1
                return self._eager(*inputs)
            self._take(inputs)
            try:
                self._graphs[ending] = self._recorded()
            except Exception as error:
                self._forget()
                self.problem = reason(error.__context__ or error)
                note_once(f"no CUDA graph ({self.problem}): updates run eagerly")
                return self._eager(*inputs)
        else:
            self._take(inputs)
        return self._run(self._graphs[ending], ending)

    def _take(self, inputs: tuple[Tensor | None, ...]) -> None:
        """Put the inputs where the graphs read them."""
        if not self._inputs:
            self._inputs = [given if given is None else given.clone() for given in inputs]
        for kept, given in zip(self._inputs, inputs, strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)

    def _run(self, graph: Graph, ending: bool) -> Any:
        graph.run()
        self._stopwatch.again(graph.regions)
        if self._whole:
            ranks.count_micro_step(self._engine, graph.norm.clone() if ending else None)
        else:
            self._engine.allreduce_gradients()
            self._engine.step()
        return type(graph.output)(*(value.clone() for value in graph.output))

    def _recorded(self) -> Graph:
        """A graph of the micro-step that is due, of which nothing has happened."""

        def work() -> Any:
            if self._whole:
                output = self._eager(*self._inputs)
            else:
                output = self._engine(*self._inputs)
                self._engine.backward(output.loss)
            return type(output)(*(value.detach() for value in output)), ranks.grad_norm(self._engine)

        try:
            with ranks.only_recorded(self._engine):
                run, (output, norm) = self._record(work)
        finally:
            regions = self._stopwatch.recorded()
        return Graph(run, output, norm, regions)

    def _forget(self) -> None:
        self._kind, self._inputs, self._graphs, self._seen = [], [], {}, {True: 0, False: 0}


class CudaRecorder:
    """Records CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._let_hooks_follow(True)
        try:
            # Other threads go on: they load data and write checkpoints.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own
            self._let_hooks_follow(False)
        return graph.replay, result

    @staticmethod
    def _let_hooks_follow(recording: bool) -> None:
        """Gradients arrive on the stream that the engine was built on; a recording has its own. See `recordable`."""
        if hasattr(torch.autograd.graph, OVERRIDE):
            getattr(torch.autograd.graph, OVERRIDE)(recording)
            getattr(torch.autograd.graph, WARNS)(not recording)

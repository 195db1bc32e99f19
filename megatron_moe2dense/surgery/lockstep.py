"""Runs the stock model's own loop over its layers for every batch at once, all of them halted before the same layer: for models whose
layers hand more to each other than hidden states (router states, chosen keys, earlier residuals). One batch computes at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
from torch import nn


class _Stopped(BaseException):
    """Ends a batch's loop that is not wanted any more."""


class _Batch(threading.Thread):
    """One batch's forward pass, which stops at every layer until it is told what the layer gives."""

    def __init__(self, run: Callable[[], Any]):
        super().__init__(daemon=True)
        self._run = run
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._outputs: SimpleQueue[Any] = SimpleQueue()

    def run(self) -> None:
        """Until the last layer has given its output."""
        try:
            with torch.no_grad():
                self._run()
            self._calls.put(None)
        except _Stopped:
            pass
        except BaseException as error:
            self._calls.put(error)

    def halt(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Called in the thread, by a layer's place."""
        self._calls.put((arguments, named))
        output = self._outputs.get()
        if output is _Stopped:
            raise _Stopped
        return output

    def next_call(self) -> Any:
        """What the next layer is called with; None behind the last one."""
        call = self._calls.get()
        if isinstance(call, BaseException):
            raise call
        return call

    def go_on(self, output: Any) -> None:
        """With what the layer gave."""
        self._outputs.put(output)


class _Place(nn.Module):
    """Stands where a decoder layer does."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # no submodule

    def __getattr__(self, name: str) -> Any:
        """What the stock model asks of a layer, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer, name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        batch = threading.current_thread()
        assert isinstance(batch, _Batch), "layers run where their batch's loop runs"
        return batch.halt(arguments, named)


class Lockstep:
    """Context manager: all batches, before the same layer.

    Args:
        run: one batch's forward pass of the base model, whose layers are `places`. batches: what each gets.
    """

    def __init__(self, run: Callable[[Any], Any], batches: list[Any]):
        self._batches = [_Batch(lambda batch=batch: run(batch)) for batch in batches]
        self._calls: list[Any] = []

    @staticmethod
    def places(layers: list[nn.Module]) -> nn.ModuleList:
        """What has to stand where the layers do."""
        return nn.ModuleList([_Place(layer) for layer in layers])

    def __enter__(self) -> Lockstep:
        for batch in self._batches:
            batch.start()
            self._calls.append(batch.next_call())  # one at a time: they share the modules
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for batch in self._batches:
            batch.go_on(_Stopped)
            batch.join()

    def hidden(self, number: int) -> torch.Tensor:
        """The hidden states of a batch before the layer that comes next."""
        arguments, named = self._calls[number]
        return arguments[0] if arguments else named["hidden_states"]

    def advance(self, number: int, layer: nn.Module) -> torch.Tensor:
        """Run the layer on a batch; its hidden states behind it."""
        arguments, named = self._calls[number]
        output = layer(*arguments, **named)
        self._batches[number].go_on(output)
        self._calls[number] = self._batches[number].next_call()
        return output[0] if isinstance(output, tuple) else output

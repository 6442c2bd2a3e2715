"""What the processes of a run do together. They may be on several machines, which share no disk.

Every process must call these functions, in the same order. With a single process they only do what they are given.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object, recursively_apply
from torch import Tensor

from sdvae.errors import InputError, one_line
from sdvae.io import changed_fields

T = TypeVar("T")


def everywhere(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function on every process. If it fails on one, no process goes on, where the others would wait for it.

    Args:
        accelerator: the run's Accelerator.
        function: it must not itself wait for the other processes.

    Returns:
        What the function returned on this process.

    Raises:
        InputError: when the function raised it on this process or on another, which is named then.
        OSError: the same.
    """
    raised: InputError | OSError | None = None
    try:
        result = function()
    except (InputError, OSError) as error:
        raised = error
    # as text, because not every exception can be pickled
    failure = (place(accelerator), isinstance(raised, InputError), one_line(raised))
    failures = gather_object([failure] if raised is not None else [])
    if raised is not None:
        raise raised
    for where, is_input, message in failures:
        raise (InputError if is_input else OSError)(f"{where}: {message}")
    return result


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function on the main process only.

    Args:
        accelerator: the run's Accelerator.
        function: it must not itself wait for the other processes. What it returns must be picklable.

    Returns:
        What the function returned, on every process. See `from_main`.

    Raises:
        InputError: on every process, when the function raised it.
        OSError: the same.
    """
    result = everywhere(accelerator, lambda: function() if accelerator.is_main_process else None)
    return from_main(accelerator, result)


def from_main(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value, on every process.

    Tensors inside dicts, lists and tuples are sent one after the other, so that the memory of a device needs room for
    only one of them.

    Args:
        accelerator: the run's Accelerator.
        value: a picklable value. Those of the other processes are not used.

    Returns:
        On the main process `value` itself; on the others a copy, with tensors on the CPU.
    """
    if accelerator.num_processes == 1:
        return value
    without_values = [recursively_apply(lambda tensor: tensor.to("meta"), value) if accelerator.is_main_process else 0]
    broadcast_object_list(without_values)

    def send(tensor: Tensor) -> Tensor:
        broadcast(tensor.detach().to(accelerator.device).contiguous())
        return tensor

    def receive(meta: Tensor) -> Tensor:
        sent = broadcast(torch.empty(meta.shape, dtype=meta.dtype, device=accelerator.device))
        return torch.empty_like(meta, device="cpu").copy_(sent)  # in the memory format of the original

    if accelerator.is_main_process:
        return recursively_apply(send, value)
    return recursively_apply(receive, without_values[0])


def check_same(accelerator: Accelerator, facts: Mapping[str, Any], free: frozenset[str] = frozenset()) -> None:
    """Check that all processes have the same settings and data.

    Args:
        accelerator: the run's Accelerator.
        facts: what must be the same, by name; it may be nested.
        free: dotted names of facts that may differ.

    Raises:
        InputError: on every process, with the facts that differ.
    """
    (first, expected), *others = gather_object([(place(accelerator), facts)])
    for where, found in others:
        if changes := changed_fields(expected, found, free):
            raise InputError(
                f"{first} and {where} would not train the same VAE ({'; '.join(changes)}); give every machine the same "
                "recipe and the same images"
            )


def place(accelerator: Accelerator) -> str:
    """This process's number and its machine's name, for messages."""
    return f"process {accelerator.process_index} on {socket.gethostname()}"

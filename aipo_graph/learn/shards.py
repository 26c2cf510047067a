"""One learner over several processes, *ranks* (FSDP2): each holds a part of every tensor and runs some of the micro-batches.

Where no process group was initialised there is one rank, and nothing here does anything. Every function but ``world`` must be called on
all ranks in the same order.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from aipo_graph.errors import AipoError, ConfigError, first_line

FAULTS = (AipoError, OSError, SafetensorError)
"""What work on rank 0 alone may raise, and all ranks then do."""
T = TypeVar("T")


def world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, the only one that calls it; or raises what it raised there."""
    rank, size = world()
    if size == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except FAULTS as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(value: T) -> list[T]:
    """Each rank's value, by rank."""
    values = [value] * world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def reduced(tensor: Tensor, *, largest: bool = False) -> Tensor:
    """The sum, or the maximum, of the ranks' plain tensors."""
    if world()[1] > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank holds a part, put together on all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: PreTrainedModel, device: torch.device, forward: Callable[..., Any]) -> None:
    """Gives each rank its part of ``model``, which rank 0 holds whole and the others on the meta device: layer by layer, then the rest.

    ``forward`` is bound to the model under its own name, as another forward of it. Gradients are summed over ranks, since the loss divides
    by counts of the whole batch. Raises ConfigError for a model that cannot be sharded.
    """
    size = world()[1]
    if size == 1:
        return
    name, mesh = type(model).__name__, init_device_mesh(device.type, (size,))
    layers = {path: module for path, module in model.named_modules() if type(module).__name__ in (model._no_split_modules or ())}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tables = gathered([(path, tensor.shape, tensor.dtype) for path, tensor in tensors])
    dtypes = {id(tensor): dtype for (_, tensor), (_, _, dtype) in zip(tensors, tables[0], strict=False)}
    try:
        if any([row[:2] for row in table] != [row[:2] for row in tables[0]] for table in tables):
            raise ValueError("its shape is not that of its config alone")
        if lent := _lent(model, layers):
            raise ValueError(f"layers share {lent}")
        for module in (*reversed(layers.values()), model):  # what is inside another comes first
            _receive(module, device, dtypes)
            fully_shard(module, mesh=mesh)
    except (ValueError, TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"policy.model: {name} cannot be sharded over {size} ranks ({first_line(error)}); train it on one, or use another model"
        ) from error
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, forward.__name__, MethodType(forward, model))
    register_fsdp_forward_method(model, forward.__name__)


def settle(model: nn.Module) -> None:
    """After a forward without a backward, which leaves what is outside the layers whole: weights are read and written in parts."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _lent(model: nn.Module, layers: Iterable[str]) -> str | None:
    """A parameter that two layers share, or a layer and the rest."""
    homes: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        home = max((path for path in layers if name.startswith(f"{path}.")), key=len, default="")
        if homes.setdefault(id(parameter), home) != home:
            return name
    return None


@torch.no_grad()
def _receive(module: nn.Module, device: torch.device, dtypes: Mapping[int, torch.dtype]) -> None:
    """Every tensor that is not sharded yet, from rank 0. Swapped in place, so that tied ones stay tied."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            there = not tensor.is_meta
            value = tensor.detach().to(device).contiguous() if there else torch.empty(tensor.shape, dtype=dtypes[id(tensor)], device=device)
            dist.broadcast(value, 0)
            parameter = isinstance(tensor, nn.Parameter)
            torch.utils.swap_tensors(tensor, nn.Parameter(value, tensor.requires_grad) if parameter else value.detach())

"""Several processes: one step's groups spread over ranks, one model spread over GPUs by FSDP2, under plain torchrun.

A group stays whole on its rank. Every rank makes the same number of forward and backward passes, since each of them
gathers weights from all; a rank that has fewer groups to learn from passes over one again with weights of zero.

A sharded model cannot generate quickly, as every token would gather every layer; so each rank also holds a whole copy for
the rollouts, which is overwritten with the new weights after each step. So does a single GPU without LoRA, where casting
float32 weights for each token would read twice as much.
"""

import copy
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import model as qwen
from data import BadInput


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(shard_size: int | None = None, minutes: float = 10) -> DeviceMesh | None:
    """Join the other processes that torchrun started; a rank that waits `minutes` for a dead one gives up.

    Returns the ranks as a mesh (shards,), one copy of the model spread over all of them; or with a smaller shard_size as
    (copies, shards), each copy spread over so many ranks (hybrid sharding: the GPUs of a node keep the gathering inside
    it). None for one process. Raises BadInput if the ranks are no multiple of shard_size.
    """
    size = shard_size or ranks()
    if ranks() % size:
        raise BadInput(f"--shard-size {size}: {ranks()} processes are no multiple of it")
    if torch.cuda.is_available():
        torch.cuda.set_device(qwen.device())
    if ranks() == 1:
        return None
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=minutes))
    mesh = init_device_mesh(qwen.device().type, (ranks() // size, size), mesh_dim_names=("copies", "shards"))
    return mesh if size < ranks() else mesh["shards"]


# ----------------------------------------------------------------------------------------------------------------------
# The model on all ranks

def spread(model: qwen.Qwen, mesh: DeviceMesh | None) -> tuple[qwen.Policy, torch.nn.Module]:
    """A model from the CPU -> (the policy that learns, sharded; the whole model that generates). On a CPU, and with LoRA on
    one GPU, they are one. No GPU ever holds the whole model in float32: sharding moves one unit at a time."""
    adapters = any(not weight.requires_grad for weight in model.model.language_model.parameters())
    if mesh is None and (adapters or not torch.cuda.is_available()):
        model.to(qwen.device())
        return qwen.Policy(model), model
    policy = qwen.Policy(copy.deepcopy(model))
    policy = policy.to(qwen.device()) if mesh is None else shard(policy, mesh)
    return policy, qwen.to_compute_dtype(model, vectors=True).to(qwen.device())


def frozen(policy: qwen.Policy, sampler: torch.nn.Module, mesh: DeviceMesh | None) -> qwen.Policy:
    """A copy of the policy that does not learn: the reference. (A sharded policy cannot be copied, its sampler can.)"""
    model = copy.deepcopy(policy.model if mesh is None else sampler)
    return shard(qwen.Policy(qwen.to_compute_dtype(model).requires_grad_(False)), mesh, reshard=True)


def shard(policy: qwen.Policy, mesh: DeviceMesh | None, reshard: bool | None = None) -> qwen.Policy:
    """Shard over the mesh, in units that are gathered one after the other: each decoder layer, the vision tower, and the
    rest with the tied embeddings. On a GPU the weights and the sums of gradients are float32, the compute bf16. `reshard`:
    the rest, too, is let go after a forward pass, as no backward pass will want it. One process: nothing to do."""
    if mesh is None:
        return policy
    precision = MixedPrecisionPolicy(param_dtype=qwen.compute_dtype(), reduce_dtype=torch.float32)
    for unit in (policy.model.model.visual, *policy.model.model.language_model.layers, policy):
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
        unit.set_gradient_divide_factor(1.0)                # the ranks' losses are parts of one sum, so gradients add up
        unit.set_force_sum_reduction_for_comms(True)        # gloo can only sum
    return policy


@torch.no_grad()
def refresh(sampler: torch.nn.Module, policy: qwen.Policy) -> None:
    """Write a sharded policy's weights into the whole copy, in place, one tensor at a time. Nothing to do where they are one."""
    if sampler is not policy.model:
        for mine, shards in zip(sampler.parameters(), policy.model.parameters(), strict=True):
            mine.copy_(whole(shards.to(mine.dtype)))


def collect(policy: qwen.Policy, sampler: torch.nn.Module) -> torch.nn.Module:
    """The trained weights as a whole model, in float32 on the CPU: a bf16 sampler would round them. `sampler` is used up."""
    sampler.cpu().float()  # on every rank: gathered in unlike precisions, the shards would not fit together
    refresh(sampler, policy)
    return sampler


def finish() -> None:
    """Part from the other ranks, at the end of a run that went well. After an error this would wait for them."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# What ranks tell each other

def total(value: Tensor) -> Tensor:
    """Sum over all ranks."""
    if ranks() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def means(pairs: dict[str, tuple[Tensor | float, Tensor | float]]) -> dict[str, float]:
    """{name: (sum, count)}, this rank's shares of both -> {name: mean} over all ranks, 0 where there was nothing to count.
    One exchange for all of them."""
    ours = torch.stack([torch.as_tensor(x, device=qwen.device()).double() for pair in pairs.values() for x in pair])
    sums, counts = total(ours).view(-1, 2).unbind(1)
    return dict(zip(pairs, torch.where(counts > 0, sums / counts, 0.0).tolist()))


def largest(value: int) -> int:
    """Maximum over all ranks."""
    if ranks() == 1:
        return value
    shared = torch.tensor(value, device=qwen.device())
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def gathered(value: object) -> list:
    """What each rank has, by rank."""
    if ranks() == 1:
        return [value]
    values = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's whole value."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wait() -> None:
    """Until all ranks are here."""
    if ranks() > 1:
        dist.barrier()

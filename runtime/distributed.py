"""Several processes under torchrun: groups divided among the ranks, the model sharded by FSDP2.

A group stays whole on its rank. FSDP gathers weights from all ranks in each forward and backward
pass, so every rank has to run equally many; a rank with fewer micro-batches adds dummy passes whose
tokens carry no loss.

A sharded model generates slowly, because every token would gather every layer. So each rank also
holds a whole copy, the sampling model, which is overwritten with the new weights after each step.
A single GPU without LoRA has one too: without it, each token would cast the float32 weights again.
"""

import copy
import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from runtime.errors import UserError
from runtime.ranks import rank, world_size

# How long a rank waits, for example while the first one reads data. The groups that --shard-size
# adds keep the library's shorter timeout.
TIMEOUT = timedelta(hours=1)
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that comes when the parent ends


def device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # With its number: plain "cuda" is the first GPU in every thread but the main one.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def compute_dtype() -> torch.dtype:
    """bf16 on a GPU, float32 on a CPU. The weights that learn are always float32."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def autocast() -> torch.autocast:
    """Context in which matrix products run in compute_dtype. Casts are not cached: a pass uses each
    weight once, so the cache would be a second copy of the model (and CUDA graphs forbid it)."""
    enabled = compute_dtype() != torch.float32
    return torch.autocast(device().type, compute_dtype(), enabled=enabled, cache_enabled=False)


def init_distributed(shard_size: int | None = None,
                     timeout: timedelta = TIMEOUT) -> DeviceMesh | None:
    """Join the processes that torchrun started -> the mesh to shard over; None for one process.

    shard_size  ranks that share one copy of the model; None for all, a mesh (shards,). Fewer give a
                mesh (copies, shards), hybrid sharding: weights are gathered within a node only.
    timeout     how long a rank waits for another one
    On a CPU it takes one thread, unless OMP_NUM_THREADS is set. Raises UserError if the number of
    processes is no multiple of shard_size.
    """
    size = shard_size or world_size()
    if world_size() % size:
        raise UserError(f"--shard-size {size}: {world_size()} processes are no multiple of it; "
                        f"take a divisor of {world_size()}")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # as a killed torchrun kills none
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        # cuDNN's attention makes a plan for each new shape, which can take a second, and each step
        # has new ones. PyTorch's other kernels need none.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Beside other work threads wait for each other, so that a step can take 20 times as long.
        torch.set_num_threads(1)
    if rank() == 0:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"device: {name}, threads: {torch.get_num_threads()} (OMP_NUM_THREADS sets them), "
              f"processes: {world_size()}", flush=True)
    if world_size() == 1:
        return None
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timeout,
                                device_id=device() if backend == "nccl" else None)
    shape = (world_size() // size, size)
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=("copies", "shards"))
    return mesh if size < world_size() else mesh["shards"]


def destroy() -> None:
    """Destroy the process group after a successful run. After an error this would wait forever."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# The model on all ranks. A `policy` is a module that wraps .model; its .fsdp_units() are the
# submodules that are gathered one at a time.

def to_compute_dtype(module: Module, vectors: bool = False,
                     to: torch.device | None = None) -> Module:
    """Cast a frozen module's matrices, in place, to what its forward pass computes with.

    Vectors (norms, biases) are float32, as autocast leaves them, so log-probs do not change. FSDP
    casts them too; `vectors` does so in the whole copy of a sharded model. Buffers are not cast.
    With `to` it moves, one weight at a time: the host never holds all of them cast.
    """
    for weight in module.parameters():
        is_cast = vectors or weight.dim() > 1
        dtype = compute_dtype() if is_cast else torch.float32
        weight.data = weight.data.to(to or weight.device, dtype)
    return module.to(to) if to else module


def build_policy_and_sampling_model(policy: Module,
                                    mesh: DeviceMesh | None) -> tuple[Module, Module]:
    """A policy on the CPU -> (the policy that learns, sharded; the whole model that generates).

    They share their weights where one process has nothing to cast: on a CPU, and with LoRA, whose
    frozen matrices are in compute_dtype already. The weights come mapped from a file, and become
    float32 as shards. So with several processes neither the host nor a GPU ever holds the whole
    model in float32.
    """
    sampling_model = policy.model  # the original: peft's view of it saves the adapters
    has_adapters = any("lora_" in name for name, _ in policy.named_parameters())
    is_shared = mesh is None and (has_adapters or compute_dtype() == torch.float32)
    if not is_shared:  # the copy has the same weights until it is moved or sharded
        same = {id(w): Parameter(w.data, w.requires_grad) for w in policy.parameters()}
        policy = copy.deepcopy(policy, same)
    policy = policy.to(device()) if mesh is None else apply_fsdp(policy, mesh)
    if not has_adapters:
        policy.float()
    if not is_shared:
        to_compute_dtype(sampling_model, vectors=True, to=device())
    return policy, sampling_model


def make_ref_model(policy: Module, sampling_model: Module, mesh: DeviceMesh | None) -> Module:
    """A frozen copy of the policy: the reference model of the KL penalty."""
    # A sharded policy cannot be copied; its sampling model has the same weights.
    model = copy.deepcopy(policy.model if mesh is None else sampling_model)
    ref_model = type(policy)(to_compute_dtype(model).requires_grad_(False)).eval()
    return apply_fsdp(ref_model, mesh, reshard=True)


def apply_fsdp(policy: Module, mesh: DeviceMesh | None, reshard: bool | None = None) -> Module:
    """Shard the policy over the mesh, in place; without a mesh there is nothing to do.

    Each of policy.fsdp_units() is one unit, and the rest, with the tied embeddings, is another. On
    a GPU the weights and the sums of gradients over micro-batches and ranks are float32, the
    compute is bf16. `reshard` frees the rest, too, after its forward pass: right where no backward
    pass follows.
    """
    if mesh is None:
        return policy
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(), reduce_dtype=torch.float32)
    for unit in (*policy.fsdp_units(), policy):
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
        unit.set_gradient_divide_factor(1.0)           # the ranks' losses are parts of one sum
        unit.set_force_sum_reduction_for_comms(True)   # gloo can only sum
    return policy


@torch.no_grad()
def sync_sampling_model(sampling_model: Module, policy: Module) -> None:
    """Copy the weights that learn from the policy into the sampling model in place, one tensor at a
    time. Those that are frozen have been the same from the start, and are not gathered."""
    if sampling_model is policy.model:
        return
    for weight, shard in zip(sampling_model.parameters(), policy.model.parameters(), strict=True):
        if shard.requires_grad:
            weight.copy_(full_tensor(shard.to(weight.dtype)))


# --------------------------------------------------------------------------------------------------
# Collectives; with one process each returns what it was given

def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks; the argument is not changed."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """Maximum over all ranks."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device())
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def all_reduce_means(pairs: dict[str, tuple[Tensor | float, Tensor | float]]) -> dict[str, float]:
    """{name: (this rank's sum, its count)} -> {name: mean over all ranks}, NaN where the count is
    0. One all-reduce for all of them."""
    local = [torch.as_tensor(x, dtype=torch.float64, device=device())
             for pair in pairs.values() for x in pair]
    sums, counts = all_reduce_sum(torch.stack(local)).view(-1, 2).unbind(1)
    return dict(zip(pairs, (sums / counts).tolist()))


def all_gather_object(value: object) -> list:
    """The values of all ranks, in the order of the ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole value of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()

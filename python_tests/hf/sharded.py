"""Run by two processes: is a model whose weights are really sharded refused, with the reason?"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import ConsensusDrop
from python_tests.hf.models import random_llava


def shard(how: str) -> torch.nn.Module:
    """A LLaVA whose decoder is sharded over the processes."""
    model = random_llava()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "fsdp":
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
    else:
        attention = model.model.language_model.layers[0].self_attn
        parallelize_module(attention, mesh, {"q_proj": ColwiseParallel()})
    return model


def main() -> None:
    dist.init_process_group("gloo")
    for how in sys.argv[1:]:
        try:
            patch(shard(how), ConsensusDrop(keep=4))
        except RuntimeError as error:
            print(f"{how} refused: {error}" if "sharded" in str(error) else f"{how} {error!r}")
        else:
            print(f"{how} was taken")
    dist.barrier()
    dist.destroy_process_group()
    # The meshes above live on, and with them gloo's threads. One that asks for Python's lock while
    # the interpreter shuts down is unwound through C++ that may not throw, and the process aborts.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

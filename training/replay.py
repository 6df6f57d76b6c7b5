"""A micro-batch as one CUDA graph: small models otherwise wait for the processor that starts their kernels."""

import gc
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import logging

from ..data.batches import Batch

Backward = Callable[[nn.Module, Batch, float], dict[str, torch.Tensor]]

MEMORY = 1.5  # a recording takes up to 1.3 times what the same micro-batch takes running
WARM_UP = 2  # micro-batches, in which kernels are compiled and what depends on shapes alone is made

logger = logging.get_logger(__name__)


class Replayed:
    """
    `backward` of `training.loop.train`, recorded once for a shape of batches and replayed for those that follow.

    Gradients have to stay where they are: whoever zeroes them fills them with zeros. What cannot be recorded, such as
    packed rows, whose bounds are data, runs as it is.
    """

    def __init__(self, backward: Backward):
        self.backward, self.is_possible = backward, True
        self.forget()

    @staticmethod
    def serves(accelerator: Accelerator) -> bool:
        """Whether there is a GPU, and nothing between the model and its gradients."""
        return accelerator.device.type == "cuda" and accelerator.distributed_type == DistributedType.NO

    def forget(self) -> None:
        """Free the recording. Other shapes in between may push out what it reads: bounds, which fla keeps by shape."""
        self.graph, self.shape, self.calls = None, None, 0
        self.batch = self.scale = self.outputs = None

    def __call__(self, model: nn.Module, batch: Batch, scale: float) -> dict[str, torch.Tensor]:
        if not self.is_possible or batch.position_ids is not None:
            return self.backward(model, batch, scale)
        if batch.token_ids.shape != self.shape:
            self.forget()
            self.shape = batch.token_ids.shape
        self.calls += 1
        if self.calls <= WARM_UP or (self.graph is None and not self._record(model, batch)):
            return self.backward(model, batch, scale)
        self.batch.token_ids.copy_(batch.token_ids)
        self.batch.weights.copy_(batch.weights)
        self.scale.fill_(scale)
        self.graph.replay()
        return self.outputs

    def _record(self, model: nn.Module, batch: Batch) -> bool:
        """Record a micro-batch like this one; nothing runs. False, from then on, if it cannot be done."""
        self.batch = Batch(batch.token_ids.clone(), batch.weights.clone())
        self.scale = torch.ones((), device=batch.token_ids.device)
        graph = torch.cuda.CUDAGraph()
        # PyTorch gives nothing back while it records, and what a recording that fails has taken is lost.
        gc.collect()
        torch.cuda.empty_cache()
        needed = MEMORY * (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
        if torch.cuda.mem_get_info()[0] < needed:
            return self._give_up("too little memory")
        try:
            with torch.cuda.graph(graph):
                self.outputs = self.backward(model, self.batch, self.scale)
        except RuntimeError as error:
            # What went wrong first: to end the recording fails too, and says no more than that.
            return self._give_up(str(error.__context__ or error).splitlines()[0])
        self.graph = graph
        return True

    def _give_up(self, reason: str) -> bool:
        self.forget()
        self.is_possible = False
        logger.warning(f"a step cannot be recorded as a CUDA graph, and runs as it is: {reason}")
        return False

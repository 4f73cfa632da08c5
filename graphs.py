"""A training step's work on a GPU as CUDA graphs: recorded once, then launched as a whole."""

from collections import Counter

import torch

from utils import UserError, first_line, out_of_memory

UNRECORDED = 3  # first steps of a kind, in which cuDNN and cuBLAS choose and set up


class Graphs:
    """`gradients`, train.py's function, recorded and replayed.

    The hundreds of kernels of a step at batch 4 take longer to launch than to run; a graph launches them at
    once, the same kernels with the same results. Each kind of step has its own: another size of batch, batch
    norm fixed or not, a round of feedback before it or not.
    """

    def __init__(self, gradients):
        self.gradients = gradients
        self.steps = Counter()
        self.recorded = {}
        self.pool = None  # of memory, which all graphs share: they never run at the same time

    def __call__(self, model, images, features, loss, optimizer, clip=0):
        """What `gradients` does and returns, whose tensors the next call overwrites."""
        modes = tuple(module.training for module in model.decoder.modules())
        again = getattr(model.core, "again", False)
        kind = images.shape, features is None, modes, again  # what decides which kernels are launched
        self.steps[kind] += 1
        if self.steps[kind] <= UNRECORDED:
            return self.gradients(model, images, features, loss, optimizer, clip)
        if kind not in self.recorded:
            self.recorded[kind] = self.record(model, images, features, loss, optimizer, clip)
        graph, inputs, terms, gradients = self.recorded[kind]
        for place, value in zip(inputs, (images, features), strict=True):
            if place is not None:
                place.copy_(value)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return terms

    def record(self, model, images, features, loss, optimizer, clip):
        """(graph, where it reads images and features, where it leaves the terms, [(parameter, gradient)])."""
        inputs = images.clone(), None if features is None else features.clone()
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad()  # so that the graph has gradients of its own
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                terms = self.gradients(model, *inputs, loss, optimizer, clip)
        except RuntimeError as error:
            cause = error.__context__ or error  # what is raised behind it says only that the recording failed
            if out_of_memory(cause):
                raise cause from None
            reason = first_line(cause)
            raise UserError(f"this step makes no CUDA graph; give --no-graphs ({reason})") from None
        self.pool = graph.pool()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return graph, inputs, terms, [(parameter, parameter.grad) for parameter in parameters]

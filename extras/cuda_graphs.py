"""The work of a training step on a GPU as CUDA graphs: recorded once, then launched as a whole."""

from collections import Counter

import torch

from utils import UserError, first_line, out_of_memory

WARMUP_STEPS = 3  # of each kind, in which cuDNN and cuBLAS choose their algorithms


class CudaGraphStep:
    """train.py's `forward_backward`, recorded and replayed: the same kernels with the same results.

    At batch 4 the hundreds of kernels of a step take longer to launch than to run. Each kind of step,
    `graph_key`, has its own graph.
    """

    def __init__(self, forward_backward):
        self.forward_backward = forward_backward
        self.steps = Counter()
        self.recorded = {}
        self.pool = None  # of memory; graphs share it, since they never run at the same time

    def __call__(self, training, images, features=None):
        """As forward_backward; the next call overwrites the tensors that it returns."""
        key = graph_key(training, images, features)
        self.steps[key] += 1
        if self.steps[key] <= WARMUP_STEPS:
            return self.forward_backward(training, images, features)
        if key not in self.recorded:
            self.recorded[key] = self.record(training, images, features)
        graph, inputs, terms, gradients = self.recorded[key]
        for static, value in zip(inputs, (images, features), strict=True):
            if static is not None:
                static.copy_(value)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return terms

    def record(self, training, images, features):
        """(graph, its input tensors, its output terms, [(parameter, gradient)])."""
        inputs = images.clone(), None if features is None else features.clone()
        graph = torch.cuda.CUDAGraph()
        training.optimizer.zero_grad()  # so that the graph has gradients of its own
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                terms = self.forward_backward(training, *inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # the last error says only that the recording failed
            if out_of_memory(cause):
                raise cause from None
            why = first_line(cause)
            raise UserError(f"this step makes no CUDA graph; give --no-graphs ({why})") from None
        self.pool = graph.pool()
        return graph, inputs, terms, [(p, p.grad) for p in training.inverter.decoder.parameters()]


def graph_key(training, images, features):
    """What decides which kernels a step launches."""
    modes = tuple(module.training for module in training.inverter.decoder.modules())
    warm_start = getattr(training.inverter.base_decoder, "warm_start", False)
    return images.shape, features is None, modes, warm_start

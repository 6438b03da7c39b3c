"""Worker script that times PyTorch: reads and answers one line of JSON per request.

It imports only torch and NumPy, so that any interpreter can run it. Arrays are passed
through files.
"""

import json
import resource
import sys
import time

import numpy as np


class Case:
    """Hold a layer with its input; each phase is a method."""

    def __init__(self, path, dtype, axis, channels_last, momentum):
        arrays = {name: torch.from_numpy(a) for name, a in np.load(path).items()}
        self.axis, self.channels_last = axis, channels_last
        kind = getattr(torch, dtype)
        self.x, self.dy = (self.to_layout(arrays[n].to(kind)) for n in ("x", "dy"))
        self.scale, self.bias = arrays["scale"], arrays["bias"]
        for leaf in (self.x, self.scale, self.bias):
            leaf.requires_grad_()
        self.mean, self.var = arrays["mean"], arrays["var"]
        self.momentum = momentum
        self.bessel = 1 - self.scale.numel() / self.x.numel()

    def to_layout(self, a):
        """Move features to axis 1; in memory they are last if `channels_last`."""
        a = a.movedim(self.axis, 1)
        last = self.channels_last
        return a.contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )

    def normalize(self, training):
        return torch.nn.functional.batch_norm(
            self.x,
            self.mean,
            self.var,
            self.scale,
            self.bias,
            training,
            1 - self.momentum,
            EPSILON,
        )

    def forward(self):
        self.y = self.normalize(True)

    def backward(self):
        self.gradients = torch.autograd.grad(
            self.y, (self.x, self.scale, self.bias), self.dy, retain_graph=True
        )

    def inference(self):
        with torch.no_grad():
            self.out = self.normalize(False)

    def results(self, path):
        """Save the results of one step; the variance is biased."""
        self.forward()
        self.backward()
        dx, dscale, dbias = self.gradients
        y, dx = (a.detach().movedim(1, self.axis).float() for a in (self.y, dx))
        var = self.var * self.bessel
        names = ("y", "dx", "dscale", "dbias", "mean", "var")
        arrays = (y, dx, dscale, dbias, self.mean, var)
        np.savez(path, **{n: a.numpy() for n, a in zip(names, arrays)})  # noqa: B905

    def run(self, phase, calls, warm):
        call = getattr(self, phase)
        if warm:
            call()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = (time.perf_counter() - start) / calls
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        time.sleep(0.002)  # OpenMP's threads spin for a while after each call
        return {"seconds": seconds, "faults": faults}


def serve():
    """Answer requests until the input ends."""
    cases = {}
    for line in sys.stdin:
        message = json.loads(line)
        do, answer = message.pop("do"), {}
        name = message.pop("case", None)
        if do == "open":
            results = message.pop("results")
            cases[name] = Case(**message)
            cases[name].results(results)
        elif do == "run":
            answer = cases[name].run(**message)
        elif do == "close":
            cases.clear()
        print(json.dumps(answer), flush=True)


EPSILON = 1e-5

if __name__ == "__main__":
    try:
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(int(sys.argv[1]))
        print(json.dumps({"version": torch.__version__}), flush=True)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
    else:
        serve()

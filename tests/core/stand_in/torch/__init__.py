"""As much of torch as the engine touches."""

import numpy as np


class Tensor:
    def __init__(self, array):
        self.array = np.asarray(array)

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def cpu(self):
        return self

    def numpy(self):
        return self.array


def stack(tensors):
    return Tensor(np.stack([tensor.array for tensor in tensors]))

"""A model and data of your own: handwritten digits, 1,797 images of 8 x 8 pixels that come with scikit-learn.

    elastictrain train docs/examples/digits.yaml

`Digits` is what is trained, `samples` what it learns from; docs/own-model.md and docs/own-data.md explain them.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from elastictrain.data.samples import TensorSamples
from elastictrain.workloads.own import OwnWorkload


class Digits(OwnWorkload):
    def create(self):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10),
        )  # fmt: skip

    def loss(self, module, batch):
        return F.cross_entropy(module(batch["image"]).float(), batch["digit"])


def samples(config, split):
    images, digits = load_digits(return_X_y=True)
    held_out = torch.arange(len(digits)) % 8 == 0  # every eighth image
    chosen = held_out if split == "validation" else ~held_out
    image = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return TensorSamples({"image": image[chosen], "digit": torch.tensor(digits)[chosen]})

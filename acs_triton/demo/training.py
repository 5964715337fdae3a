"""Training and evaluation of the segmentation network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .data import CLASSES, Brain, Crops
from .network import Segmenter

BATCH = 2
RATE = 1e-2
ENCODER_RATE = 3e-3
"""Learning rates: the encoder's is lower, as is usual in fine-tuning; the same for both starts."""
SMOOTHING = 1.0
"""Voxels added to both sides of the soft Dice ratio, which is 0 / 0 for an absent structure."""


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy plus one minus the soft Dice coefficient, averaged over the structures.

    Args:
        logits: ``(N, classes, D, H, W)``.
        labels: ``(N, D, H, W)`` int64; 0 is background, which the Dice part leaves out.
    """
    probability = logits.softmax(dim=1)[:, 1:]
    target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:]
    axes = (0, 2, 3, 4)
    overlap = (probability * target).sum(axes)
    total = probability.sum(axes) + target.sum(axes)
    soft_dice = (2 * overlap + SMOOTHING) / (total + SMOOTHING)
    return F.cross_entropy(logits, labels) + 1 - soft_dice.mean()


def stepper(network: Segmenter, steps: int) -> Callable[[Brain], float]:
    """A function that trains the network on one batch and returns its loss; for ``steps`` calls."""
    groups = [list(network.encoder.parameters()), [*network.ups.parameters(), *network.head.parameters()]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    rates = [ENCODER_RATE, RATE]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.2)

    def step(batch: Brain) -> float:
        loss = segmentation_loss(network(batch.image), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def train(network: Segmenter, crops: Crops, steps: int, name: str) -> list[float]:
    """Train in place under a progress bar with this name; returns the loss of each step."""
    network.train()
    step = stepper(network, steps)
    losses = []
    with tqdm(range(steps), desc=name, unit="step") as progress:
        for _ in progress:
            losses.append(step(crops.batch(BATCH)))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def segment(network: nn.Module, image: torch.Tensor, slabs: list[range], depth: int) -> torch.Tensor:
    """Labels that the network gives some slabs of a volume.

    Each slab is seen in the middle of a window of ``depth`` positions, as thick as the training crops.

    Returns:
        ``(D, H, W)`` int64 on the CPU, as large as ``image``, 0 outside the slabs.
    """
    network.eval()
    labels = torch.zeros(image.shape, dtype=torch.int64)
    for slab in slabs:
        start = (slab.start + slab.stop - depth) // 2
        start = min(max(start, 0), len(image) - depth)
        window = network(image[None, start : start + depth])[0].argmax(0).cpu()
        labels[slab.start : slab.stop] = window[slab.start - start : slab.stop - start]
    return labels


def dice(prediction: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Dice coefficient of every structure.

    Args:
        prediction, labels: int64, of one shape; 0 is background.

    Returns:
        ``(structures,)`` float64; NaN where neither has a voxel of the structure.
    """
    joint = torch.bincount((CLASSES * labels + prediction).flatten(), minlength=CLASSES**2)
    joint = joint.reshape(CLASSES, CLASSES).double()
    return (2 * joint.diagonal() / (joint.sum(0) + joint.sum(1)))[1:]

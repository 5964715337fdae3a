"""What the recipes share: one process or many, training that resumes after a kill, and error messages.

A run is a function of its options and seed. The order of the data, their augmentation and the
randomness inside the network (dropout) are drawn from the seed and the position, not from a
generator that has been running: so the position is all of the random state there is to save, and a
run that was killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from acs_triton import LiftingError

AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
MACHINE = ("output", "device", "workers", "save_every", "skip_broken")
"""Options that say where and how a run computes, not what: they may change when it resumes."""
LOOK_EVERY = 10
"""Steps between two looks at the losses, each of which waits for the device."""
ORDER, ITEM, STEP = range(3)
"""What a number is drawn for; see :func:`derive`."""


class InputError(Exception):
    """Something that the user can put right; shown as one sentence, without a traceback."""


def command(main: Callable) -> Callable[..., int]:
    """Make ``main`` return an exit status: 0, 1 after an error that the user can put right, 130 after Ctrl-C."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        status = 0
        try:
            main(arguments)
        except (InputError, LiftingError) as error:
            status = 1
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nInterrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
            return 130
        if dist.is_initialized():
            dist.destroy_process_group()
        return status

    return run


def parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the options that all recipes have; ``output`` is the default folder."""
    options = argparse.ArgumentParser(
        description=description.strip(), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--output", type=Path, default=Path(output), help="folder of checkpoint and picture")
    options.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    options.add_argument("--device", type=device, default=device(None), help="where to run, e.g. cuda or cpu")
    options.add_argument("--amp", choices=AMP, default="none", help="autocast to this dtype")
    options.add_argument("--workers", type=int, default=0, help="processes that load data, for each training process")
    options.add_argument("--save-every", type=positive, default=50, help="steps between two checkpoints")
    return options


def positive(text: str) -> int:
    """Type of an option: an integer from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 up, got {text!r}")
    return int(text)


def device(text: str | None) -> torch.device:
    """Type of an option: a device that works; None is the best there is."""
    text = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"must be a device that PyTorch can use here, got {text!r}") from error


def derive(*numbers: int) -> int:
    """A seed for each tuple of non-negative integers; seeds of different tuples are unrelated."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Processes:
    """The processes of a run: this one alone, or all that ``torchrun`` started.

    Attributes:
        rank, size: this process's number, and how many there are.
        device: this process's own.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.size == 1:
            return
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def say(self, text: str) -> None:
        """Print once, not once a process."""
        if self.rank == 0:
            tqdm.write(text)

    def map(self, function: Callable, items: Sequence, name: str) -> list:
        """``[function(item) for item in items]``, known to all processes, each of which computes its share."""
        share = tqdm(items[self.rank :: self.size], desc=name, disable=self.rank > 0, leave=False)
        mine = [function(item) for item in share]
        if self.size == 1:
            return mine
        parts = [None] * self.size
        dist.all_gather_object(parts, mine)
        return [parts[index % self.size][index // self.size] for index in range(len(items))]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with gradients averaged over the processes."""
        return model if self.size == 1 else nn.parallel.DistributedDataParallel(model)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


class Draw(NamedTuple):
    """What a dataset is asked for: an item, and the seed of its augmentation."""

    index: int
    seed: int


class Order:
    """The batches of a whole run, for one of its processes: a new permutation in each epoch.

    Every process gets as many items (a few come twice if they do not divide), so that all make the
    same steps. An item that would be alone in the last batch, where batch norm fails, joins the
    batch before.

    Args:
        items: size of the data set.
        batch: items in a batch of one process.
    """

    def __init__(self, items: int, batch: int, epochs: int, seed: int, rank: int = 0, size: int = 1):
        self.items, self.seed, self.rank, self.size = items, seed, rank, size
        share = -(-items // size)
        self.cuts = list(range(0, share, batch))
        if len(self.cuts) > 1 and share - self.cuts[-1] == 1:
            self.cuts.pop()
        self.cuts.append(share)
        self.steps_per_epoch = len(self.cuts) - 1
        self.steps = epochs * self.steps_per_epoch

    def after(self, step: int) -> Iterator[list[Draw]]:
        """The batches that follow the first ``step`` ones."""
        while step < self.steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(derive(self.seed, ORDER, epoch))
            order = torch.randperm(self.items, generator=generator)
            share = torch.arange(self.rank, self.cuts[-1] * self.size, self.size) % self.items
            mine = order[share].tolist()
            for first, end in zip(self.cuts[position:-1], self.cuts[position + 1 :], strict=True):
                yield [Draw(index, derive(self.seed, ITEM, epoch, index)) for index in mine[first:end]]
                step += 1


class Run:
    """A training run that goes on where its checkpoint stands.

    ::

        run = Run(path, options, processes, model, optimizer, items=len(dataset), epochs=10, batch=2)
        for image, label in run.batches(dataset):
            with run.autocast():
                loss = ...(run.net(image), label)
            run.update(loss)
            if run.epoch_ended:
                run.record(dice=...)

    Args:
        path: the checkpoint's file; resumed from if it exists.
        options: what :func:`parser` gave. A checkpoint that was written with others is refused.
        model: the network, on the process's device; saved and restored.
        optimizer: over its parameters; saved and restored.
        items, epochs, batch: size of the data set, passes over it, and items in a batch of one process.
        rate: the learning rates' factor for the part of the run that is done, in [0, 1).

    Attributes:
        net: call this one in training: ``model``, or the same with gradients averaged over processes.
        step: updates done.
        history: ``"loss"``, one number an update, and what :meth:`record` was given.

    Raises:
        InputError: the checkpoint cannot be read, or is of another run or network.
    """

    def __init__(
        self,
        path: Path,
        options: argparse.Namespace,
        processes: Processes,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        items: int,
        epochs: int,
        batch: int,
        rate: Callable[[float], float] = lambda done: 1.0,
    ):
        self.path, self.processes, self.model, self.optimizer, self.rate = path, processes, model, optimizer, rate
        self.seed, self.workers, self.save_every = options.seed, options.workers, options.save_every
        self.identity = {name: str(value) for name, value in vars(options).items() if name not in MACHINE}
        self.identity["processes"] = str(processes.size)
        self.order = Order(items, batch, epochs, options.seed, processes.rank, processes.size)
        self.amp = AMP[options.amp]
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.amp is torch.float16)
        self.step, self.history, self._losses = 0, {"loss": []}, []
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if path.exists():
            self._resume()
        self.net = processes.wrap(model)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.order.steps_per_epoch

    @property
    def epoch_ended(self) -> bool:
        return self.step % self.order.steps_per_epoch == 0

    def batches(self, dataset: Dataset) -> Iterator[tuple[Tensor, ...]]:
        """The batches still to come, on the device, under a progress bar; saves between two of them.

        Args:
            dataset: gives for a :class:`Draw` a tuple of tensors that depends on nothing else.
        """
        loader = DataLoader(
            dataset,
            batch_sampler=self.order.after(self.step),
            num_workers=self.workers,
            pin_memory=self.processes.device.type == "cuda",
        )
        name = self.path.stem if self.path.stem != "checkpoint" else "training"
        bar = tqdm(total=self.order.steps, initial=self.step, desc=name, unit="step", disable=self.processes.rank > 0)
        with bar:
            for batch in loader:
                self.net.train()
                torch.manual_seed(derive(self.seed, STEP, self.processes.rank, self.step))
                yield tuple(part.to(self.processes.device, non_blocking=True) for part in batch)
                due = self.step % self.save_every == 0 or self.step == self.order.steps
                if due or self.step % LOOK_EVERY == 0:
                    self._look()
                    bar.set_postfix(loss=f"{np.mean(self.history['loss'][-LOOK_EVERY:]):.3f}")
                if due:
                    self.save()
                bar.update()

    def autocast(self):
        """The context for the network and the loss."""
        return torch.autocast(self.processes.device.type, self.amp, enabled=self.amp is not None)

    def update(self, loss: Tensor) -> None:
        """One step of the optimiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate(self.step / self.order.steps)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self._losses.append(loss.detach())
        self.step += 1

    def record(self, **values: float | list) -> None:
        """Append to the history."""
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    def evaluate(self, function: Callable, items: Sequence, name: str = "evaluation") -> list:
        """:meth:`Processes.map` without gradients, with the same network in eval mode in all processes."""
        self.model.eval()
        if self.processes.size > 1:  # running statistics of batch norm are each process's own
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        with torch.no_grad(), self.autocast():
            return self.processes.map(function, items, name)

    def save(self) -> None:
        """Write the checkpoint."""
        if self.processes.rank == 0:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "history": self.history,
                "identity": self.identity,
            }
            write(self.path, lambda file: torch.save(state, file))

    def _resume(self) -> None:
        state = read_checkpoint(self.path)
        if not isinstance(state, dict) or "identity" not in state:
            raise InputError(f"{self.path} is no checkpoint of this recipe; choose another --output")
        then, now = state["identity"], self.identity
        for name in {**now, **then}:
            if then.get(name) != now.get(name):
                raise InputError(
                    f"{self.path} is of a run with {name.replace('_', '-')} {then.get(name)}, not {now.get(name)}: "
                    "choose another --output, or the same options"
                )
        load_weights(self.model, state["model"], self.path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        if self.step < self.order.steps:
            self.processes.say(f"{self.path}: goes on after step {self.step} of {self.order.steps}")

    def _look(self) -> None:
        """Move the losses from the device to the history.

        Raises:
            InputError: one is not finite.
        """
        if not self._losses:
            return
        losses = self.processes.mean(torch.stack(self._losses).float()).tolist()
        self._losses = []
        if not np.isfinite(losses).all():
            raise InputError(
                f"the loss became {losses[-1]} before step {self.step}: try a lower learning rate or another --amp; "
                f"{self.path} is from before"
            )
        self.history["loss"] += losses


def write(path: Path, fill: Callable) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, whole.

    Args:
        fill: writes the contents to the binary file it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    with suppress(OSError):  # the new name outlives a power cut only then; not every system can
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_checkpoint(path: Path):
    """What ``torch.save`` wrote to a file.

    Raises:
        InputError: there is no such file, or it is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever the bytes lead it to
        raise InputError(f"{path} cannot be read as a checkpoint: {one_line(error)}") from error


def load_weights(model: nn.Module, state: dict, path: Path) -> None:
    """Load a state dict that was read from ``path``.

    Raises:
        InputError: it is of another architecture.
    """
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is of another architecture: {one_line(error)}") from error


def one_line(error: BaseException, length: int = 160) -> str:
    """The beginning of an error's message, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length] + "..."


def smooth(values: Sequence[float], width: int = 20) -> np.ndarray:
    """Means of the last ``width`` values (fewer at the start), for drawing."""
    total = np.cumsum([0.0, *values])
    last = np.arange(1, len(total))
    first = np.maximum(last - width, 0)
    return (total[last] - total[first]) / (last - first)

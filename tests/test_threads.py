"""Threads, processes and forked workers beside the layers."""

import multiprocessing
import threading

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from acs_triton import geometry, use_backend
from acs_triton.operators import ACSConv, SoftACSConv


def network():
    layers = ACSConv(2, 6, 3, padding=1), nn.ReLU(), SoftACSConv(6, 4, 3, padding=1), ACSConv(4, 3, 3, stride=2)
    return nn.Sequential(*layers).double()


def results(net, x):
    y = net(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), tuple(net.parameters()))


def test_eight_threads_on_one_module_equal_one():
    # Sizes of their own: the threads fill the caches of geometry at the same time.
    net, inputs = network(), [torch.randn(1, 2, 7 + i, 9, 8 + i % 3, dtype=torch.float64) for i in range(8)]
    expected, found = [results(net, x) for x in inputs], [None] * 8
    geometry._resolve.cache_clear()
    together = threading.Barrier(8)

    def work(i):
        together.wait()
        for _ in range(5):
            found[i] = results(net, inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_backward_pass_on_another_thread():
    net, x = network(), torch.randn(1, 2, 7, 6, 8, dtype=torch.float64)
    expected = results(net, x)[1:]
    loss = net(x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for parameter, wanted in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, wanted)


def outputs(net, x):
    with torch.no_grad():
        return (net(x),)


def computed_elsewhere(connection, function):
    torch.set_num_threads(1)
    net, x = connection.recv()
    connection.send([one.numpy() for one in function(net, x)])


def in_process(method, function, net, x):
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=computed_elsewhere, args=(there, function))
    process.start()
    here.send((net, x))
    assert here.poll(120), f"the {method}ed process gave no answer"
    answer = here.recv()
    process.join(30)
    assert process.exitcode == 0
    return answer


def test_a_module_sent_to_another_process():
    net, x = network(), torch.randn(1, 2, 6, 7, 8, dtype=torch.float64)
    # PyTorch refuses a backward pass in a forked process once its parent's autograd engine has started threads.
    for method, function in ("spawn", results), ("fork", outputs):
        for found, wanted in zip(in_process(method, function, net, x), function(net, x), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted)


class Volumes(Dataset):
    """Volumes that the workers themselves run through a layer."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = torch.full((2, 5, 5, 5), float(index))
        with torch.no_grad(), use_backend("torch"):
            return x, self.layer(x)


def test_forked_workers_beside_training():
    layer = ACSConv(2, 3, 3, padding=1)
    layer(torch.zeros(1, 2, 5, 5, 5)).sum().backward()  # the parent has run before it forks
    loader = DataLoader(Volumes(layer), batch_size=2, num_workers=2, multiprocessing_context="fork")
    seen = 0
    for x, y in loader:
        torch.testing.assert_close(y, layer(x))
        layer(x).sum().backward()
        seen += len(x)
    assert seen == 6

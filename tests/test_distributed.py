"""Two processes (gloo, CPU): DistributedDataParallel, FSDP2, and SyncBatchNorm in lifted networks.

The file is also the training script: the tests start it once under ``torchrun`` and look at what
each of its checks reports.
"""

import json
import os
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from acs_triton import convert
from acs_triton.operators import ACSConv, SoftACSConv

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def network():
    torch.manual_seed(7)
    layers = ACSConv(2, 6, 3, padding=1), nn.ReLU(), SoftACSConv(6, 4, 3, padding=1), ACSConv(4, 1, 3, stride=2)
    return nn.Sequential(*layers).double()


def batch(step):
    """The joined batch of a step: four volumes, two a process."""
    return torch.randn(4, 2, 7, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model, part, steps=3):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(part(batch(step))).square().mean().backward()
        optimizer.step()
    return model


def own_part(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def assert_same_parameters(found, expected):
    for (name, one), two in zip(found.items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")


@check
def data_parallel_equals_one_process():
    found = train(nn.parallel.DistributedDataParallel(network()), own_part)
    assert_same_parameters(found.module.state_dict(), train(network(), lambda x: x))


@check
def data_parallel_of_a_lifted_network():
    def lifted():
        torch.manual_seed(3)
        layers = nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 3, 3)
        return convert(nn.Sequential(*layers).double())

    found = train(nn.parallel.DistributedDataParallel(lifted()), own_part)
    assert_same_parameters(found.module.state_dict(), train(lifted(), lambda x: x))


@check
def fully_sharded_equals_one_process():
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    weight = model[0].weight
    assert weight.to_local().shape[0] == weight.shape[0] // 2  # each process holds half of the kernels
    train(model, own_part)
    full = {name: value.full_tensor() for name, value in model.state_dict().items()}
    assert_same_parameters(full, train(network(), lambda x: x))


def with_batch_norm():
    torch.manual_seed(5)
    return convert(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    )


@check
def synchronised_batch_norm_without_a_gpu():
    """It converts, keeps the state, and evaluates; PyTorch itself says that training needs a GPU."""
    x, plain = batch(0), with_batch_norm()
    net = nn.SyncBatchNorm.convert_sync_batchnorm(with_batch_norm())
    assert isinstance(net[1], nn.SyncBatchNorm)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert torch.equal(net.eval()(x), plain.eval()(x))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        net.train()(x)


def channels(tensor):
    """A channel's values as a row."""
    return tensor.transpose(0, 1).flatten(1)


def along_channels(values, like):
    return values.view(1, -1, *[1] * (like.dim() - 2))


def statistics(x, eps):
    rows = channels(x)
    return rows.mean(1), (rows.var(1, unbiased=False) + eps).rsqrt()


def joined_statistics(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    share = (counts / counts.sum()).view(-1, 1)
    mean = (share * means).sum(0)
    var = (share * (invstds**-2 - eps + means**2)).sum(0) - mean**2
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (var + eps).rsqrt()


def normalise(x, weight, bias, mean, invstd, eps):
    return (x - along_channels(mean, x)) * along_channels(invstd * weight, x) + along_channels(bias, x)


def sums_of_gradient(grad, x, mean, invstd, weight, *_):
    weighted = channels(grad * (x - along_channels(mean, x))).sum(1)
    return channels(grad).sum(1), weighted, weighted * invstd, channels(grad).sum(1)


def gradient_of_input(grad, x, mean, invstd, weight, sum_grad, sum_weighted, counts):
    total = counts.sum()
    centred = (x - along_channels(mean, x)) * along_channels(invstd**2 * sum_weighted / total, x)
    return (grad - along_channels(sum_grad / total, x) - centred) * along_channels(invstd * weight, x)


@contextmanager
def synchronised_batch_norm_on_the_cpu():
    """PyTorch's SyncBatchNorm with its five GPU kernels written out for the CPU."""
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in {
        "batch_norm_stats": statistics,
        "batch_norm_gather_stats_with_counts": joined_statistics,
        "batch_norm_elemt": normalise,
        "batch_norm_backward_reduce": sums_of_gradient,
        "batch_norm_backward_elemt": gradient_of_input,
    }.items():
        library.impl(name, kernel, "CPU")
    with mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"):
        yield
    library._destroy()


@check
def synchronised_batch_norm_equals_one_process():
    expected, steps = train(with_batch_norm(), lambda x: x), []
    net = nn.SyncBatchNorm.convert_sync_batchnorm(with_batch_norm())
    for parameter in net.parameters():

        def average(parameter):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
            steps.append(parameter)

        parameter.register_post_accumulate_grad_hook(average)
    with synchronised_batch_norm_on_the_cpu():
        train(net, own_part)
    assert len(steps) == 3 * len(list(net.parameters()))
    assert_same_parameters(net.state_dict(), expected)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, function in CHECKS.items():
        try:
            function()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("distributed")
    root = Path(__file__).parents[1]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    ran = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name, results):
    for rank, result in enumerate(results):
        assert result[name] == "passed", f"rank {rank}: {result[name]}"


if __name__ == "__main__":
    main(sys.argv[1])

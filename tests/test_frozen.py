"""What is kept with frozen weights is never stale; nothing is kept with others."""

import copy
import gc
import io
import pickle
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from acs_triton import frozen
from acs_triton.frozen import FrozenParameter, derived, once, supported


def step(optimizer, **options):
    def edit(weight):
        weight.requires_grad_(True).grad = torch.ones_like(weight)
        once(weight, "doubled", lambda: None)  # a forward pass of the training that the step belongs to
        optimizer([weight], lr=0.1, **options).step()
        weight.requires_grad_(False)

    return edit


def load(weight, **options):
    module = nn.Linear(3, 2, bias=False)
    module.weight = weight
    module.load_state_dict({"weight": torch.randn(2, 3)}, **options)


def converted(weight):
    module = nn.Linear(3, 2, bias=False)
    module.weight = weight
    module.double().add_module("other", nn.Linear(2, 2))
    module.float()


EDITS = {
    "in place": lambda weight: weight.add_(1),
    "one element": lambda weight: weight.__setitem__((0, 0), 7.0),
    "inference mode": torch.inference_mode()(lambda weight: weight.mul_(2)),
    "detached": lambda weight: weight.detach().neg_(),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
    "data in place": lambda weight: weight.data.copy_(torch.randn(2, 3)),
    "another data": lambda weight: setattr(weight, "data", torch.randn(2, 3)),
    "from a vector": lambda weight: nn.utils.vector_to_parameters(torch.randn(6), [weight]),
    "initialised": nn.init.normal_,
    "swapped": lambda weight: torch.utils.swap_tensors(weight, FrozenParameter(torch.randn(2, 3), requires_grad=False)),
    "other dtypes": converted,
    "checkpoint": load,
    "SGD": step(torch.optim.SGD),
    "SGD, all at once": step(torch.optim.SGD, foreach=True),
    "Adam, fused": step(torch.optim.Adam, fused=True),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_seen(edit):
    weight, computed = FrozenParameter(torch.randn(2, 3), requires_grad=False), []

    def doubled():
        return once(weight, "doubled", lambda: computed.append(1) or weight.detach() * 2)

    for _ in range(2):
        assert torch.equal(doubled(), weight * 2)
    assert len(computed) == 1
    with torch.no_grad():
        EDITS[edit](weight)
    assert torch.equal(doubled(), weight * 2)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(2, 3),
        nn.Parameter(torch.randn(2, 3)),
        nn.Parameter(torch.randn(2, 3), requires_grad=False),
        FrozenParameter(torch.randn(2, 3)),
    ],
    ids=["tensor", "parameter", "without gradient", "frozen, but with gradient"],
)
def test_nothing_is_kept_with_others(weight):
    assert once(weight, "a", lambda: object()) is not once(weight, "a", lambda: object())
    assert "_kept" not in vars(weight)


def test_nothing_is_kept_of_inference_tensors():
    with torch.inference_mode():
        weight = FrozenParameter(torch.randn(2, 3), requires_grad=False)
        assert once(weight, "a", lambda: object()) is not once(weight, "a", lambda: object())


def test_inference_mode_keeps_to_itself():
    weight = FrozenParameter(torch.randn(2, 3), requires_grad=False)
    with torch.inference_mode():
        assert derived(weight, "half", torch.Tensor.half).is_inference()
    x = torch.randn(2, 3, dtype=torch.float16, requires_grad=True)
    (x * derived(weight, "half", torch.Tensor.half)).sum().backward()


@pytest.mark.skipif(not supported(), reason="this PyTorch does not trace frozen parameters")
def test_fake_tensors_are_not_kept():
    weight = FrozenParameter(torch.randn(2, 3), requires_grad=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        derived(weight, "half", torch.Tensor.half)
    assert type(derived(weight, "half", torch.Tensor.half)) is FrozenParameter
    assert torch.equal(derived(weight, "half", torch.Tensor.half), weight.half())


def test_what_is_derived_follows():
    weight = FrozenParameter(torch.randn(2, 3), requires_grad=False)

    def twice_derived():
        return derived(derived(weight, "half", torch.Tensor.half), "t", torch.Tensor.t)

    assert twice_derived() is twice_derived()
    weight.data.add_(1)
    assert torch.equal(twice_derived(), weight.half().t())


def test_streams_and_cuda_graphs(monkeypatch):
    """What a stream computed is for that stream; a graph that is captured takes nothing and leaves nothing."""
    weight, gpu = FrozenParameter(torch.randn(2, 3), requires_grad=False), torch.device("cuda", 0)
    capturing, stream = [False], [7]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream[0]))
    on_cpu = frozen._stream
    monkeypatch.setattr(frozen, "_stream", lambda device: on_cpu(gpu))
    first = once(weight, "a", object)
    assert once(weight, "a", object) is first
    stream[0] = 8
    assert once(weight, "a", object) is not first
    stream[0], capturing[0] = 7, True
    assert once(weight, "a", object) is not first
    capturing[0] = False
    assert once(weight, "a", object) is first
    assert on_cpu(torch.device("meta")) is None


def test_threads():
    weight, wrong = FrozenParameter(torch.zeros(2, 3), requires_grad=False), []

    def work(number):
        for turn in range(200):
            what = number, turn % 20
            if once(weight, what, lambda what=what: what) != what:
                wrong.append(what)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_carry_nothing():
    weight = FrozenParameter(torch.randn(2, 3), requires_grad=False)
    once(weight, "a", threading.Lock)  # which cannot be copied
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(file, weights_only=False)):
        assert type(other) is FrozenParameter
        assert torch.equal(other, weight)
        assert not other.requires_grad
        assert not vars(other).get("_kept")


def test_nothing_is_kept_alive():
    weight, value = FrozenParameter(torch.randn(2, 3), requires_grad=False), torch.zeros(1)
    ends = [weakref.ref(weight), weakref.ref(once(weight, "a", value.clone))]
    del weight
    gc.collect()
    assert [end() for end in ends] == [None, None]


def test_few_things_are_kept():
    weight = FrozenParameter(torch.randn(2, 3), requires_grad=False)
    for what in range(100):
        assert once(weight, what, lambda what=what: what) == what
    assert len(weight._kept) <= 16

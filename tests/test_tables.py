import weakref

import pytest
import torch

from acs_triton.tables import keep


class Tables:
    """What a cache holds."""


@pytest.mark.parametrize("capturing", [False, True])
def test_tables_that_a_graph_was_captured_with_are_kept(capturing, monkeypatch):
    made = []

    @keep(maxsize=1)
    def make(shape, where):
        tables = Tables()
        made.append(weakref.ref(tables))
        return tables

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    gpu = torch.device("cuda")
    make(1, gpu)
    assert make(1, gpu) is made[0]()
    make(2, gpu)
    assert len(made) == 2
    assert (made[0]() is not None) is capturing

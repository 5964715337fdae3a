"""Lifted networks in ONNX: standard operators only, for any depth, height and width."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acs_triton.lifting import KINDS, convert

pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.norm, self.group = nn.BatchNorm2d(6), nn.GroupNorm(2, 6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.patches = nn.Conv2d(6, 4, 2, stride=2)
        self.up = nn.ConvTranspose2d(6, 2, 2, 2)
        self.mix = nn.Conv2d(7, 3, 3, padding=1)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        y = self.depthwise(F.relu(self.norm(self.down(x))))
        z = F.interpolate(self.patches(self.group(F.max_pool2d(y, 3, 1, 1))), x.shape[2:], mode="bilinear")
        x = self.mix(torch.cat([x, self.up(y), z], 1))
        return x, self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mean"])  # which is soft with fixed shares
def test_onnx_runtime_gives_the_same(kind):
    model = convert(Network(), kind).eval()
    sizes = dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)
    with torch.no_grad():
        program = torch.onnx.export(
            model, (torch.randn(1, 1, 8, 12, 16),), dynamo=True, dynamic_shapes={"x": sizes}, verbose=False
        )
    assert {node.domain for node in program.model.graph} == {""}
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in ((8, 12, 16), (10, 18, 14), (14, 10, 22)):
        volume = torch.randn(1, 1, *size)
        for found, expected in zip(session.run(None, {"x": volume.numpy()}), model(volume), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)

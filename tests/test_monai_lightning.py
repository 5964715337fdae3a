"""Lifted networks in MONAI's and Lightning's training loops, and in MONAI's sliding-window inference."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from acs_triton import convert
from acs_triton.models import LiftedUNet

pytestmark = pytest.mark.filterwarnings("ignore")


def planar():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def examples():
    """Volumes with a bright block, and where it is."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(8):
        image = 0.3 * torch.randn(1, 8, 12, 12, generator=generator)
        label = torch.zeros(1, 8, 12, 12, dtype=torch.long)
        d, h, w = (int(torch.randint(0, 5, (), generator=generator)) for _ in range(3))
        label[:, d : d + 3, h : h + 5, w : w + 6] = 1
        found.append({"image": image + label, "label": label})
    return found


def loss_of(logits, label):
    return F.cross_entropy(logits, label[:, 0])


def test_supervised_trainer():
    engines = pytest.importorskip("monai.engines")
    pytest.importorskip("ignite", reason="MONAI's engines need pytorch-ignite")
    model = convert(planar(), in_channels=1)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    losses = []
    trainer = engines.SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=6,
        train_data_loader=DataLoader(examples(), batch_size=4),
        network=model,
        optimizer=torch.optim.Adam(model.parameters(), 0.02),
        loss_function=loss_of,
        amp=True,
    )
    from ignite.engine import Events

    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output[0]["loss"]))
    )
    trainer.run()
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(value, start[key]) for key, value in model.state_dict().items())


def test_lightning():
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")

    class Segmentation(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.losses = LiftedUNet(Stages(), classes=2, deep_supervision=1), []

        def training_step(self, batch):
            full, half = self.network(batch["image"])
            small = F.interpolate(batch["label"].float(), size=half.shape[2:], mode="nearest").long()
            loss = loss_of(full, batch["label"]) + 0.5 * loss_of(half, small)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    torch.manual_seed(0)
    module = Segmentation()
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=True,
    )
    trainer.fit(module, DataLoader(examples(), batch_size=4))
    assert trainer.global_step == 10
    assert module.losses[-1] < 0.7 * module.losses[0]
    volume = examples()[0]
    found = module.network.eval()(volume["image"][None]).argmax(1)
    assert (found == volume["label"]).float().mean() > 0.9


class Stages(nn.Module):
    """Maps at strides 2 and 4."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, x):
        return [x := self.one(x), self.two(x)]


def test_sliding_windows():
    """Where only one window looks, and its border is out of sight, the result is that of the whole volume."""
    inferers = pytest.importorskip("monai.inferers")
    volume = torch.randn(1, 3, 20, 24, 22)
    for kind in ("acs", "3d"):
        model = convert(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)), kind).eval()
        with torch.no_grad():
            whole = model(volume)
            found = inferers.sliding_window_inference(volume, (12, 12, 12), 2, model, overlap=0.25)
        assert found.shape == whole.shape
        first = (..., slice(8), slice(8), slice(8))  # the next window starts at 8
        torch.testing.assert_close(found[first], whole[first])
    unet = LiftedUNet(Stages(), in_channels=3, classes=2).eval()
    with torch.no_grad():
        found = inferers.sliding_window_inference(volume, (16, 16, 16), 1, unet, overlap=0.5, mode="gaussian")
    assert found.shape == (1, 2, 20, 24, 22)
    assert found.isfinite().all()

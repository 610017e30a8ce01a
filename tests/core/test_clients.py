"""The layers and costs in somebody else's trainer, as a user would write it."""

import copy

import bounds
import pytest
import torch
from cases import rand

import torchbp

lightning = pytest.importorskip(
    "lightning", reason="needs lightning: pip install torchbp[clients]"
)

pytestmark = [
    # lightning's own loader, about the pytree module of torch >= 2.9.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated, "
        r"use `isinstance\(treespec, TreeSpec\) and treespec.is_leaf\(\)` instead."
        ":FutureWarning"
    ),
    # Advice that depends on the machine; the data are in memory and the model is small.
    pytest.mark.filterwarnings(
        "ignore:The 'train_dataloader' does not have many workers which may be a "
        "bottleneck"
    ),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


class Regression(lightning.LightningModule):
    """A network and a cost of this package, a native optimiser."""

    def __init__(self):
        super().__init__()
        self.model = torchbp.MLP([6, 8, 3], "tanh", "identity", init="torch")
        self.cost = torchbp.QuadraticCost()

    def training_step(self, batch, index):
        x, y = batch
        return self.cost(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(model):
    """`model` after a fit on data that it can learn, and its costs before and after."""
    x = rand(64, 6, dtype=torch.float32)
    y = (x @ rand(6, 3, seed=1, dtype=torch.float32)).tanh()
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=16
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with torch.no_grad():
        before = model.cost(model.model(x), y).item()
    trainer.fit(model, batches)
    with torch.no_grad():
        return before, model.cost(model.model(x), y).item()


def test_lightning_fits():
    torch.manual_seed(0)
    before, after = fitted(Regression())
    assert after < before / 2


def test_lightning_fits_as_it_fits_native_layers():
    """Step for step: the same weights after a fit, up to rounding."""
    torch.manual_seed(0)
    ours, native = Regression(), Regression()
    native.model = copy.deepcopy(torchbp.to_native(ours.model))
    fitted(ours)
    fitted(native)
    for p, q in zip(ours.parameters(), native.parameters(), strict=True):
        # Ten epochs of four batches.
        bounds.assert_within(p, q, bounds.trained(40) * float(p.detach().norm()))

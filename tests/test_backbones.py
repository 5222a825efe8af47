"""Gated networks in other libraries: they train with the rate loss, are saved, reloaded, and skip blocks in eval."""
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from timm_aig import TargetRateLoss, gated_blocks, record_gates

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Segmentation:
    """A U-Net of segmentation_models_pytorch. AIGConfig's fields are keywords of its encoder."""
    blocks = 4  # an encoder of depth 3 has two stages of two blocks

    def create(self):
        return smp.Unet('tu-resnet18_aig', encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8),
                        classes=2, target_rate=0.5)

    def loss(self, model):
        return F.cross_entropy(model(IMAGES), (IMAGES.mean(1) > 0.5).long())

    def outputs(self, model):
        return [model(IMAGES)]

    def reloaded(self, model, folder):
        model.save_pretrained(folder)
        return smp.from_pretrained(folder)


class Backbone(nn.Module):
    """What FasterRCNN needs: one tensor of features, and how many channels it has."""

    def __init__(self):
        super().__init__()
        self.body = timm.create_model('cifar_resnet8_aig', features_only=True, out_indices=(3,), target_rate=0.5)
        self.out_channels = self.body.feature_info.channels()[-1]

    def forward(self, x):
        return self.body(x)[0]


class Detection:
    """torchvision's FasterRCNN."""
    blocks = 3

    def create(self):
        return FasterRCNN(
            Backbone(), num_classes=2, min_size=32, max_size=32, rpn_post_nms_top_n_test=8,
            rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.,),)),
            box_roi_pool=MultiScaleRoIAlign(['0'], output_size=2, sampling_ratio=2))

    def loss(self, model):
        targets = [{'boxes': torch.tensor([[4., 4., 20., 20.]]), 'labels': torch.tensor([1])} for _ in IMAGES]
        return sum(model(list(IMAGES), targets).values())

    def outputs(self, model):
        return [detections[key] for detections in model(list(IMAGES)) for key in ('boxes', 'scores')]

    def reloaded(self, model, folder):
        torch.save(model.state_dict(), folder / 'model.pt')
        model = self.create()
        model.load_state_dict(torch.load(folder / 'model.pt'))
        return model


class Classification:
    """A loop in plain PyTorch around a network that gate_ converted."""
    blocks = 8

    def create(self):
        return timm.create_model('resnet18_aig', num_classes=3, target_rate=0.5)

    def loss(self, model):
        return F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 0]))

    def outputs(self, model):
        return [model(IMAGES)]

    def reloaded(self, model, folder):
        torch.save(model, folder / 'model.pt')
        return torch.load(folder / 'model.pt', weights_only=False)


def loss_with_gates(library, model):
    """The loss of a library and that of the gates."""
    rates = [block.target_rate for block in gated_blocks(model).values()]
    with record_gates(model) as record:
        loss = library.loss(model)
    assert record.gates.shape == (len(IMAGES), library.blocks)
    return loss + TargetRateLoss(rates)(record.gates)


def answers(library, model):
    with torch.inference_mode(), record_gates(model) as record:
        outputs = library.outputs(model)
    return outputs, record.gates


def rows_that_run(library, model):
    """Images for which each block computes its branch."""
    rows = dict.fromkeys(gated_blocks(model), 0)

    def count(name, residual):
        def counted(x):
            rows[name] += len(x)
            return residual(x)
        return counted

    for name, block in gated_blocks(model).items():
        block.residual = count(name, block.residual)
    answers(library, model)
    return list(rows.values())


def assert_reloaded_and_skipping(library, model, reloaded):
    outputs, gates = answers(library, model.eval())
    outputs_again, gates_again = answers(library, reloaded.eval())
    assert torch.equal(gates, gates_again) and all(map(torch.equal, outputs, outputs_again))
    assert 0 < gates.mean() < 1
    assert rows_that_run(library, reloaded) == gates.sum(0).tolist()


@pytest.mark.parametrize('library', [Segmentation(), Detection(), Classification()], ids=lambda x: type(x).__name__)
def test_it_trains_with_the_rate_loss_and_reloads_and_skips(library, train_gates, tmp_path):
    model = library.create().train()
    before = {name: block.gate.fc2.weight.clone() for name, block in gated_blocks(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss_with_gates(library, model).backward()
        optimizer.step()
    assert all(not torch.equal(before[name], block.gate.fc2.weight) for name, block in gated_blocks(model).items())
    assert_reloaded_and_skipping(library, model, library.reloaded(train_gates(model), tmp_path))

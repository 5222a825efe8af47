"""finetune.py, calibrate.py, validate.py and predict.py with a vision transformer and a ConvNeXt, from scratch."""
import json

import pytest
import timm
import torch.nn as nn

import timm_aig

NETWORKS = {
    'vit_tiny_patch16_224': ['img_size=8', 'patch_size=4', 'embed_dim=16', 'depth=3', 'num_heads=2'],
    'convnext_atto': ['patch_size=1', 'depths=(1, 1, 2, 1)', 'dims=(8, 8, 16, 16)'],
}


@pytest.fixture(params=NETWORKS)
def trained(request, finetune, finetune_args, tmp_path):
    """Folder of two trainings: static/ and, with that as the teacher, adaptive/."""
    args = [*finetune_args, '--output', str(tmp_path), '--opt', 'adamw', '--lr', '0.001', '--keep', 'last']
    assert finetune.main([*args, '--static', '--model', request.param, '--model-kwargs', *NETWORKS[request.param],
                          '--experiment', 'static']) == 0
    assert finetune.main([*args, '--model', f'local-dir:{tmp_path}/static', '--experiment', 'adaptive']) == 0
    return tmp_path


def test_they_train_and_their_folders_are_calibrated_validated_and_predict(trained, run_script, images, capsys):
    static, model = (timm.create_model(f'local-dir:{trained}/{name}', pretrained=True) for name in (
        'static', 'adaptive'))
    assert model.pretrained_cfg['input_size'] == (3, 8, 8)
    blocks = timm_aig.gated_blocks(model).values()
    assert {type(block.gate.bn) for block in blocks} == {nn.LayerNorm}
    assert timm_aig.compute_cost(model).static == timm_aig.compute_cost(static).total

    data = ['--data-dir', images, '--workers', 0, '--batch-size', 8, '--json']
    name = f'local-dir:{trained}/adaptive'
    assert run_script('calibrate.py', '--model', name, *data, '--budgets', 1, '--tolerance', 0.05,
                      '--output', trained / 'calibrated') == 0
    assert json.loads(capsys.readouterr().out)['table']
    assert run_script('validate.py', '--model', name, '--against', f'local-dir:{trained}/static', *data) == 0
    row = json.loads(capsys.readouterr().out)['rows'][0]
    results = json.loads((trained / 'adaptive' / 'results.json').read_text())
    assert row['top1'] == pytest.approx(results['metrics']['top1'])
    assert row['macs_share'] == pytest.approx(results['metrics']['macs_share'])
    assert run_script('predict.py', images / 'validation', '--model', f'local-dir:{trained}/calibrated', '--budget', 1,
                      '--json') == 0
    assert len(json.loads(capsys.readouterr().out)['rows']) == 21

"""scripts/finetune_your_photos.ipynb, run from top to bottom, with the double of the Hub."""
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / 'scripts' / 'finetune_your_photos.ipynb'
OPTIONS = dict(timeout=200, resources={'metadata': {'path': str(NOTEBOOK.parent)}})


@pytest.mark.timeout(300)
def test_it_runs_from_images_to_a_model_on_the_hub(hub, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_ENDPOINT', hub.url)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('HF_TOKEN', 'hf_alice_write')
    monkeypatch.setenv('PYTHONPATH', str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters, data = notebook.cells[1:3]
    output = tmp_path / 'my output'
    for clutter in ('digits/train/.DS_Store', 'digits/train/0/.DS_Store', 'digits/validation/Thumbs.db'):
        (output / clutter).parent.mkdir(parents=True, exist_ok=True)
        (output / clutter).write_text('no image')
    data.source, found = re.subn(r'zip\(digits.images, digits.target\)', r'[*\g<0>][:400]', data.source)
    assert found == 1  # fewer images
    for name, value in {'EPOCHS': 1, 'PHOTOS': f'{tmp_path}/photos', 'OUTPUT': str(output),
                        'REPO': 'alice/photos'}.items():
        parameters.source, found = re.subn(rf'^{name} = .*', f'{name} = {value!r}', parameters.source, flags=re.M)
        assert found == 1
    nbclient.NotebookClient(notebook, **OPTIONS).execute()
    last = ''.join(output.text for output in notebook.cells[-1].outputs if output.output_type == 'stream')
    assert '/alice/photos/commit/' in last and 'reloaded, logits equal: True' in last
    assert {'model.safetensors', 'accuracy_macs.png', 'README.md'} <= hub.files('alice/photos').keys()

    notebook.cells[3:] = [nbformat.v4.new_code_cell('print(MODEL, len(classes))')]  # after a restart of the kernel
    nbclient.NotebookClient(notebook, **OPTIONS).execute()
    assert notebook.cells[-1].outputs[0].text == 'cifar_resnet20 10\n'

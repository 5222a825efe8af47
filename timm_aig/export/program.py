"""torch.export: a model as a program that needs torch, but neither timm nor timm_aig."""
import io
import os
import warnings
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn

from ..training.checkpoint import write_atomically
from .check import TOLERANCE, check_export, file_report, own_offsets
from .model import ExportModel, prepare

__all__ = ['export_program']


def export_program(
        model: nn.Module,
        path: Union[str, os.PathLike],
        images: Optional[torch.Tensor] = None,
) -> Dict[str, Any]:
    """Write an adaptive model as a torch.export program (.pt2) for any batch size, checked before it gets its name.

    `torch.export.load(path).module()(x, gate_offset)` returns logits and gates. As in mode 'sparse' of export_onnx, a
    block is computed for the open rows of the batch only.

    Args:
        model: Adaptive classifier. It is not changed.
        path: File to write.
        images: Normalised images [N, C, H, W] of the size to export for, to check the program on. Noise if None.

    Returns:
        As export_onnx.

    Raises:
        InputError: An argument that is not allowed, or a model that cannot be exported.
        ExportError: The program disagrees with the model.
    """
    model, images, _ = prepare(path, model, images, 'sparse', None)
    path = Path(path)
    program = trace(ExportModel(model, 'sparse'), images)
    module = program.module()

    def run(x: np.ndarray, offset: Optional[np.ndarray]) -> Tuple[np.ndarray, Optional[np.ndarray]]:
        offset = own_offsets(model) if offset is None else offset
        logits, gates = module(torch.from_numpy(x), torch.from_numpy(offset))
        return logits.numpy(), gates.numpy()

    found = check_export(run, model, images, 'sparse', None, TOLERANCE['float32'])
    content = io.BytesIO()  # torch.export.save to a full disk does not say that the disk is full
    torch.export.save(program, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))
    return file_report(path, 'sparse', 'float32', found)


def trace(model: ExportModel, images: torch.Tensor) -> Any:
    """torch.export.ExportedProgram of a model for any batch of images of that size."""
    x = images[:1].expand(2, -1, -1, -1)  # torch would take a batch of 1 as fixed
    offset = torch.zeros(len(model.bias), dtype=torch.float32, device='cpu') if model.takes_offset else None
    shapes = {'x': {0: torch.export.Dim('batch')}, 'gate_offset': None}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # of the exporter, about its own code
        return torch.export.export(model, (x, offset), dynamic_shapes=shapes, strict=False)

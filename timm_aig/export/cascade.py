"""Cascades in ONNX Runtime and OpenVINO: a file for each stage, and a runner for NumPy arrays."""
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from ..config import InputError
from .runtime import open_exported

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade import Cascade

__all__ = ['CascadeRunner', 'export_cascade', 'load_exported_cascade']

SUFFIXES = {'onnx': '.onnx', 'openvino': '.xml'}


class CascadeRunner:
    """Runs the files of a cascade in rounds. An image goes on while its largest probability is below the threshold."""

    def __init__(
            self,
            runs: Sequence[Callable[[Dict[str, np.ndarray]], Any]],
            thresholds: Sequence[float],
            offsets: Sequence[Optional[np.ndarray]],
    ) -> None:
        """
        Args:
            runs: Of each stage, from its inputs by name to its outputs, logits first.
            thresholds: Of each stage but the last.
            offsets: Gate offsets [L] of each stage, None for a static model.
        """
        self.runs = runs
        self.thresholds = thresholds
        self.offsets = offsets

    def __call__(self, x: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Logits [B, num_classes] and number of stages [B] of normalised images [B, C, H, W].

        Raises:
            InputError: The images are not float32. OpenVINO would take bytes, which are not normalised.
        """
        dtype = getattr(x, 'dtype', type(x).__name__)
        if dtype != np.float32:
            raise InputError(f'must be a NumPy array of float32, not {dtype}.', 'x')
        rows, stages = np.arange(len(x)), np.zeros(len(x), np.int64)
        logits = np.empty(0, np.float32)
        for stage, (run, offset) in enumerate(zip(self.runs, self.offsets)):
            part = x if len(rows) == len(x) else x[rows]
            answers = run({'x': part} if offset is None else {'x': part, 'gate_offset': offset})[0]
            if stage == 0:
                logits = np.array(answers)
            else:
                logits[rows] = answers
            stages[rows] += 1
            if stage < len(self.thresholds):
                shifted = np.exp(answers - answers.max(1, keepdims=True))
                rows = rows[1 / shifted.sum(1) < self.thresholds[stage]]
            if not len(rows):
                break
        return logits, stages


def export_cascade(
        cascade: 'Cascade', folder: Union[str, os.PathLike], runtime: str = 'onnx', images: Optional['Tensor'] = None,
) -> List[Dict[str, Any]]:
    """Write model_1, model_2, ... by export_onnx or export_openvino, each model once, and cascade.json.

    Args:
        cascade: Cascade of models that the export function takes, adaptive or static.
        folder: Output folder, created if missing.
        runtime: 'onnx' or 'openvino'.
        images: Images [N, C, H, W] to check the files on. Their size is that of the files.

    Returns:
        The reports of the export function.

    Raises:
        InputError, ExportError, ImportError: As the export function does.
    """
    from ..blocks import gated_blocks
    from ..hub.save import move_files
    from .check import own_offsets
    from .onnx import export_onnx
    from .openvino import export_openvino

    if runtime not in SUFFIXES:
        raise InputError(f'must be one of {", ".join(SUFFIXES)}, not {runtime!r}.', 'runtime')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    export: Any = export_onnx if runtime == 'onnx' else export_openvino
    stages = []
    for index, offset, threshold in zip(cascade.order, cascade.offsets, (*cascade.thresholds, None)):
        gates = own_offsets(cascade.models[index]).tolist()
        stages.append({
            'file': f'model_{index + 1}{SUFFIXES[runtime]}', 'threshold': threshold,
            'gate_offset': (gates if offset is None else [offset] * len(gates)) or None})
    with tempfile.TemporaryDirectory(prefix='.saving-', dir=folder) as new:
        reports = [
            export(model, Path(new, f'model_{number}{SUFFIXES[runtime]}'), images=images,
                   mode='sparse' if gated_blocks(model) else 'masked')
            for number, model in enumerate(cascade.models, start=1)]
        Path(new, 'cascade.json').write_text(json.dumps({'stages': stages}, indent=2) + '\n', encoding='utf-8')
        move_files(new, folder)
    return [{**report, 'path': str(folder / Path(report['path']).name)} for report in reports]


def load_exported_cascade(
        folder: Union[str, os.PathLike], threads: Optional[int] = None, spinning: bool = True,
) -> CascadeRunner:
    """Runner of the files of export_cascade, on the CPU.

    Args:
        folder: Folder with cascade.json.
        threads: Threads to run with, the runtime's default if None.
        spinning: Threads of ONNX Runtime wait actively, see load_onnx.

    Raises:
        InputError: The folder has no cascade.json or one that export_cascade did not write.
    """
    folder = Path(folder)
    try:
        stages = json.loads((folder / 'cascade.json').read_text(encoding='utf-8'))['stages']
        files = {stage['file']: folder / Path(stage['file']).name for stage in stages}
        thresholds = [float(stage['threshold']) for stage in stages[:-1]]
        offsets = [stage['gate_offset'] and np.array(stage['gate_offset'], np.float32) for stage in stages]
    except (LookupError, OSError, TypeError, ValueError) as e:
        raise InputError(f'must hold the cascade.json of export_cascade, {folder} does not: {e}', 'folder') from e
    runs = {name: open_exported(file, threads, spinning) for name, file in files.items()}
    return CascadeRunner([runs[stage['file']] for stage in stages], thresholds, offsets)

"""Exported files in ONNX Runtime, optimised for the machine they run on.

ONNX Runtime lays out weights and activations of a static graph in blocks of channels, for the CPU at hand, and fuses
sums and activations into convolutions. It does not do so inside branches. Here the branches are laid out side by side,
ONNX Runtime optimises the static graph that results, and the branches are put back into what it made of it.
"""
import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import numpy as np

from ..training.checkpoint import write_atomically
from .branches import NCHWC, inline_branches, restore_branches, subgraphs
from .passes import create_session, guard_layout, lift_last_convs, shorten_gates

import onnx  # isort: skip, named as missing by the modules above
import onnxruntime as ort  # isort: skip

__all__ = ['load_onnx', 'optimize_onnx']

FORCED = 1e4  # gate_offset that opens a gate
TOLERANCE = 1e-4


def optimize_onnx(path: Union[str, os.PathLike], output: Optional[Union[str, os.PathLike]] = None) -> Path:
    """Make a file of export_onnx faster on this machine; it then serves only this kind of CPU and this ONNX Runtime.

    The result is compared with the portable file before it is written. On a CPU whose blocks have another size it
    raises an error when it runs, however it was loaded.

    Args:
        path: Portable file of mode 'branch' in float32, which is kept. Others have nothing to gain.
        output: File to write, <name>.optimized.onnx beside it by default.

    Returns:
        Where it was written.

    Raises:
        ValueError: path is no such file.
        RuntimeError: The optimised graph disagrees with the portable one; nothing was written.
        ImportError: The `export` extra is not installed.
    """
    path = Path(path)
    output = path.with_name(f'{path.stem}.optimized.onnx') if output is None else Path(output)
    content = path.read_bytes()
    portable = _parse(content, path)
    if _machine_of(portable) is not None:
        raise ValueError(f'{path} is optimized already, give the portable file that it was made from.')
    if not _has_branches(portable):
        raise ValueError(f"{path} is not of mode 'branch' in float32: ONNX Runtime optimizes it as it loads it.")
    static, branches = inline_branches(portable)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'optimized.onnx')
        # what both sides of a branch have in common would be moved out of it and run for closed blocks too
        disabled = ['CommonSubexpressionElimination']
        create_session(static.SerializeToString(), optimized=file, disabled_optimizers=disabled)
        optimized = restore_branches(onnx.load(file), branches, portable)
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(static).graph.output}
    lift_last_convs(optimized.graph, {branch.name: shapes[branch.then[0]] for branch in branches})
    shorten_gates(optimized.graph)
    if any(node.domain == NCHWC for graph in subgraphs(optimized.graph) for node in graph.node):
        guard_layout(optimized)
    optimized.producer_name, optimized.producer_version = portable.producer_name, portable.producer_version
    del optimized.metadata_props[:]
    optimized.metadata_props.extend(portable.metadata_props)
    machine = {**_machine(), 'source': hashlib.sha256(content).hexdigest()}
    optimized.metadata_props.add(key='machine', value=json.dumps(machine))
    result = optimized.SerializeToString()
    _compare(create_session(content), create_session(result))
    write_atomically(output, lambda file: file.write(result), shared=True)
    return output


def load_onnx(path: Union[str, os.PathLike], threads: Optional[int] = None, spinning: bool = True) -> Any:
    """onnxruntime.InferenceSession of an exported file, optimised for this machine.

    Args:
        path: Portable file: if it is one for optimize_onnx, the optimised file beside it is used if it fits, otherwise
            made. Or an optimised file: one that was made on another CPU, by another ONNX Runtime, or from another
            portable file than the one beside it, is made again.
        threads: Threads to run with, ONNX Runtime's default if None.
        spinning: Threads wait actively. Faster, unless other work shares the CPU.

    Raises:
        ValueError: An optimised file does not fit and there is no portable file to make it from.
        And what optimize_onnx raises.
    """
    path = Path(path)
    portable, optimized = path, path.with_name(f'{path.stem}.optimized.onnx')
    model = _parse(path.read_bytes(), path)
    if not _has_branches(model):
        return create_session(path.read_bytes(), threads, spinning)
    if _machine_of(model) is not None:
        portable, optimized = path.with_name(path.name.replace('.optimized', '')), path
    if not _fits(optimized, portable):
        if not portable.is_file() or portable == optimized:
            raise ValueError(
                f'{path} was optimized for another CPU or ONNX Runtime, and the portable file that it was made from is '
                f'not beside it: export it again, or load the portable file.')
        optimize_onnx(portable, optimized)
    return create_session(optimized.read_bytes(), threads, spinning)


def _parse(content: bytes, path: Path) -> Any:
    try:
        model = onnx.load_from_string(content)
    except Exception as e:  # protobuf's own
        raise ValueError(f'{path} is not an ONNX file.') from e
    if model.producer_name != 'timm_aig':
        raise ValueError(f'{path} was not written by timm_aig.export_onnx.')
    return model


def _has_branches(model: Any) -> bool:
    values = {p.key: p.value for p in model.metadata_props}
    return (values.get('mode'), values.get('precision')) == ('branch', 'float32')


def _machine() -> Dict[str, str]:
    """What an optimised file depends on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = '|'.join(next((x for x in lines if x.startswith(key)), '') for key in ('model name', 'flags', 'Features'))
    except OSError:
        pass
    return {'onnxruntime': ort.__version__, 'cpu': hashlib.sha256(cpu.encode()).hexdigest()}


def _machine_of(model: Any) -> Optional[Dict[str, str]]:
    """The machine that a file was optimised for, None for a portable one."""
    values = {p.key: p.value for p in model.metadata_props}
    return json.loads(values['machine']) if 'machine' in values else None


def _fits(optimized: Path, portable: Path) -> bool:
    if not optimized.is_file():
        return False
    machine = _machine_of(_parse(optimized.read_bytes(), optimized)) or {}
    source = machine.pop('source', None)
    if portable != optimized and portable.is_file() and source != hashlib.sha256(portable.read_bytes()).hexdigest():
        return False
    return machine == _machine()


def _compare(portable: Any, optimized: Any) -> None:
    """Raises RuntimeError if two sessions give other logits or gates on noise, with their own, open or closed gates."""
    inputs = {value.name: value for value in [*portable.get_inputs(), *portable.get_overridable_initializers()]}
    shape = [size if isinstance(size, int) else 1 for size in inputs['x'].shape]
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    cases: List[Dict[str, np.ndarray]] = [{}]
    if 'gate_offset' in inputs:
        cases += [{'gate_offset': np.full(inputs['gate_offset'].shape, sign * FORCED, np.float32)} for sign in (1, -1)]
    for case in cases:
        expected, found = (session.run(None, {'x': x, **case}) for session in (portable, optimized))
        scale = max(1., float(np.abs(expected[0]).max()))
        if not np.abs(expected[0] - found[0]).max() <= TOLERANCE * scale or not all(
                map(np.array_equal, expected[1:], found[1:])):
            raise RuntimeError('the optimized graph disagrees with the portable file: nothing was written.')

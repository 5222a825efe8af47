"""Changes to a graph that ONNX Runtime has optimised, for what its optimiser leaves of the cost of branches."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

import numpy as np

from .branches import NCHWC, sorted_nodes, subgraphs

try:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper
except ImportError as e:
    raise ImportError(f"ONNX files need pip install 'timm_aig[export]' ({e}).") from e

__all__ = ['create_session', 'guard_layout', 'lift_last_convs', 'shorten_gates']


def create_session(
        model: bytes, threads: Optional[int] = None, spinning: bool = True, optimized: Optional[Path] = None,
        disabled_optimizers: Optional[List[str]] = None,
) -> Any:
    """onnxruntime.InferenceSession on the CPU of the content of a file.

    Args:
        model: Content of the file.
        threads: To run with, ONNX Runtime's default if None.
        spinning: Threads wait actively.
        optimized: Write the optimised graph there.
        disabled_optimizers: Names of optimisations to leave out.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # no warning that gate_offset, an input, has a default: it is meant to
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry('session.intra_op.allow_spinning', str(int(spinning)))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(
        model, options, providers=['CPUExecutionProvider'], disabled_optimizers=disabled_optimizers)


def lift_last_convs(graph: Any, shapes: Dict[str, List[int]]) -> None:
    """Take the last convolution of a block, which adds the shortcut, out of its branch, where that saves a copy.

    Inside, it cannot add in place: ONNX Runtime copies the shortcut, as it does for a closed block. Outside it can. A
    closed block then hands it one block of input channels with weights, bias and pixels 0, so that it gives
    relu(0 + shortcut), which is the shortcut. For that the weights pass through the branch and are copied: it pays
    where they are fewer than the pixels.

    Args:
        graph: Optimised graph with branches, changed in place.
        shapes: Shape of the output of each `If`, by name.
    """
    weights = {initializer.name: initializer for initializer in graph.initializer}
    block = _block_size()
    nodes: List[Any] = []
    for node in graph.node:
        bodies = {a.name: a.g for a in node.attribute if a.HasField('g')}
        conv = bodies and _last_conv(bodies['then_branch'], bodies['else_branch'], weights)
        if not conv or np.prod(weights[conv.input[1]].dims) > 0.5 * np.prod(shapes[node.name]):
            nodes.append(node)
            continue
        then = bodies['then_branch']
        height, width = shapes[node.name][2:]
        channels = weights[conv.input[1]].dims[0]
        inside: List[Any] = []
        outside: List[Any] = []
        for n in then.node:
            after = n.op_type == 'GlobalAveragePool' and n.input[0] == conv.output[0]
            (outside if n == conv or after else inside).append(n)
        taken = [conv.input[0], conv.input[1], conv.input[2]]
        zeros = [(1, block, height, width), (channels, block, 1, 1), (channels,)]
        closed = [f'{node.name}.closed.{i}' for i in range(3)]
        opened = [taken[0], f'{node.name}.open.1', f'{node.name}.open.2']
        given = [f'{node.name}.given.{i}' for i in range(3)]
        graph.initializer.extend(
            numpy_helper.from_array(np.zeros(shape, np.float32), f'{name}.zeros') for name, shape in zip(closed, zeros))
        inside += [helper.make_node('Identity', [taken[i]], [opened[i]]) for i in (1, 2)]
        outputs = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in x] for x in (opened, closed)]
        nodes.append(helper.make_node(
            'If', [node.input[0]], given, name=node.name,
            then_branch=helper.make_graph(inside, then.name, [], outputs[0]),
            else_branch=helper.make_graph(
                [helper.make_node('Identity', [f'{n}.zeros'], [n]) for n in closed],
                f'{node.name}.closed', [], outputs[1])))
        results = dict(zip([output.name for output in then.output], node.output))
        for n in outside:
            n.output[0] = results.get(n.output[0], n.output[0])
            if n.op_type == 'Conv' and n.input[1] == taken[1]:
                n.input[:3] = given
            elif n.op_type == 'GlobalAveragePool':
                n.input[0] = results[n.input[0]]
            nodes.append(n)
    nodes = sorted_nodes(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def _last_conv(then: Any, otherwise: Any, weights: Dict[str, Any]) -> Any:
    """The pointwise blocked convolution with sum and ReLU at the end of a branch whose other side is the shortcut."""
    producers = {name: node for node in then.node for name in node.output}
    conv = producers[then.output[0].name]
    if conv.op_type != 'Conv' or conv.domain != NCHWC or len(conv.input) != 4 or not conv.input[2]:
        return None
    if list(weights[conv.input[1]].dims[2:]) != [1, 1] or _attributes(conv).get('activation') != b'Relu':
        return None
    closed = next(node for node in otherwise.node if node.output[0] == otherwise.output[0].name)
    return conv if closed.op_type == 'Identity' and closed.input[0] == conv.input[3] else None


def _attributes(node: Any) -> Dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def shorten_gates(graph: Any) -> None:
    """Remove calls that only rename or copy a handful of numbers on the way to a condition."""
    producers = {name: node for node in graph.node for name in node.output}
    sizes = {initializer.name: int(np.prod(initializer.dims)) for initializer in graph.initializer}
    for node in list(graph.node):
        if node.op_type == 'If' and producers[node.input[0]].op_type == 'Reshape':
            node.input[0] = producers[node.input[0]].input[0]  # ONNX Runtime takes one element of any shape
        flat = producers.get(node.input[0]) if node.op_type in ('Gemm', 'FusedGemm') else None
        reorder = producers.get(flat.input[0]) if flat is not None and flat.op_type == 'Reshape' else None
        if flat is not None and reorder is not None and reorder.op_type == 'ReorderOutput':
            channels = next(a.i for a in reorder.attribute if a.name == 'channels')
            if channels % 16 == 0 and sizes.get(node.input[1]) == channels:  # one pixel: both layouts are the same
                flat.input[0] = reorder.input[0]
    while unused := [n for n in graph.node if not {*n.output} & _used(graph)]:
        for node in unused:
            graph.node.remove(node)


def _used(graph: Any) -> Set[str]:
    taken = {name for part in subgraphs(graph) for node in part.node for name in node.input}
    return taken | {output.name for output in graph.output}


def _layout_probe() -> Any:
    """Nodes that lay out 16 channels of 2 pixels in blocks, their initializers, and the order that results here."""
    ramp = np.arange(32, dtype=np.float32).reshape(1, 16, 1, 2)
    arrays = {'layout.ramp': ramp, 'layout.flat': np.array([-1])}
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    nodes = [
        helper.make_node('ReorderInput', ['layout.ramp'], ['layout.blocked'], domain=NCHWC),
        helper.make_node('Reshape', ['layout.blocked', 'layout.flat'], ['layout.order']),
    ]
    output = helper.make_tensor_value_info('layout.order', TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid('', 20), helper.make_opsetid(NCHWC, 1)]
    model = helper.make_model(
        helper.make_graph(nodes, 'layout', [], [output], initializers), opset_imports=opsets, ir_version=10)
    return nodes, initializers, create_session(model.SerializeToString()).run(None, {})[0]


def _block_size() -> int:
    """Channels in a block: the second pixel of the first channel comes behind as many numbers."""
    return _layout_probe()[2].tolist().index(1)


def guard_layout(model: Any) -> None:
    """Make the model fail on a CPU whose blocks are not those of this one, where its weights would be out of order.

    Some numbers in the blocked layout are compared with their order here; if they differ, an element is taken that is
    not there. ONNX Runtime does all of it once, when it loads the file.
    """
    nodes, initializers, order = _layout_probe()
    nodes += [
        helper.make_node('Sub', ['layout.order', 'layout.here'], ['layout.difference']),
        helper.make_node('Abs', ['layout.difference'], ['layout.distance']),
        helper.make_node('ReduceMax', ['layout.distance'], ['layout.largest'], keepdims=0),
        helper.make_node('Cast', ['layout.largest'], ['layout.differs'], to=TensorProto.INT64),
        helper.make_node(
            'Gather', ['layout.zero', 'layout.differs'], ['layout.checked'], name='optimized_for_another_kind_of_CPU'),
        helper.make_node('Add', ['gate_offset', 'layout.checked'], ['layout.guarded']),
    ]
    initializers += [
        numpy_helper.from_array(order, 'layout.here'), numpy_helper.from_array(np.zeros(1, np.float32), 'layout.zero')]
    graph = model.graph
    for part in subgraphs(graph):
        for node in part.node:
            node.input[:] = ['layout.guarded' if name == 'gate_offset' else name for name in node.input]
    nodes += list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)

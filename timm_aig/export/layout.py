"""Rows of samples in ONNX Runtime's own layout, without reordering them at the edges of each block.

ONNX Runtime lays out activations in blocks of channels for its convolutions, and reorders them before and behind every
other operator. GatherND and ScatterND here copy whole samples, Add and ReLU work element by element: to them the layout
does not matter, and the reorders can go. Time over the static parent, ResNet-50, 2 cores, with all gates open and with
half of them: 1.08 and 0.62 at batch 1 rather than 1.12 and 0.63, 1.09 and 0.62 at batch 8 rather than 1.20 and 0.65.
"""
from collections import Counter
from typing import Any, Dict, Iterable, List, Set

__all__ = ['remove_reorders']

NCHWC = 'com.microsoft.nchwc'  # ONNX Runtime's operators on tensors in blocks of channels
ANY_LAYOUT = {'Add': (0, 1), 'GatherND': (0,), 'Relu': (0,), 'ScatterND': (0, 2)}  # and which inputs are activations


def remove_reorders(graph: Any) -> bool:
    """Remove the reorders that a graph optimised by ONNX Runtime can do without, in place, and fuse sums.

    Returns:
        Whether there are fewer of them now.
    """
    from onnx import helper

    before = _count_reorders(graph.node)
    blocked: Dict[str, str] = {}  # tensors in blocks of channels, by the names of the plain ones
    channels: Dict[str, int] = {}  # of these
    pending: Dict[str, Any] = {}  # reorders that make the plain ones, until an operator needs them
    pooled: Set[str] = set()  # one pixel: the same in both layouts
    renamed: Dict[str, str] = {}
    nodes: List[Any] = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        source, output = (*node.input, '')[0], node.output[0]
        op, count = node.op_type, next((a.i for a in node.attribute if a.name == 'channels'), 0)
        if op.startswith('Reorder') and source in pooled and count % 16 == 0:  # the blocks have 8 or 16 channels
            renamed[output] = source
        elif op == 'ReorderInput' and source in blocked:
            renamed[output] = blocked[source]
        elif op == 'ReorderOutput' and count % 16 == 0:
            blocked[output], channels[output], pending[output] = source, count, node
        elif (activations := ANY_LAYOUT.get(op, ())) and all(node.input[i] in blocked for i in activations):
            channels[output], blocked[output] = channels[source], f'{output}_blocked'
            pending[output] = helper.make_node(
                'ReorderOutput', [blocked[output]], [output], domain=NCHWC, channels=channels[output])
            for i in activations:
                node.input[i] = blocked[node.input[i]]
            node.output[0] = blocked[output]
            nodes.append(node)
        elif op == 'GlobalAveragePool' and (source in blocked or node.domain == NCHWC):
            node.domain, node.input[0] = NCHWC, blocked.get(source, source)
            pooled.add(output)
            nodes.append(node)
        else:
            if node.domain == NCHWC and source in pooled:  # a convolution of squeeze and excitation
                pooled.add(output)
            nodes += [pending.pop(name) for name in node.input if name in pending]
            nodes.append(node)
    # The shapes of the layout, without which ONNX Runtime would not reuse memory in place. Others may be wrong.
    shapes = []
    for value in graph.value_info:
        if value.name in blocked:
            value.name = blocked[value.name]
        if value.name in blocked.values():
            shapes.append(value)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(_fuse(nodes))
    graph.value_info.extend(shapes)
    return _count_reorders(nodes) < before


def _count_reorders(nodes: Iterable[Any]) -> int:
    return sum(node.op_type.startswith('Reorder') for node in nodes)


def _fuse(nodes: List[Any]) -> List[Any]:
    """Move sums and ReLUs behind a convolution into it."""
    from onnx import helper

    uses = Counter(name for node in nodes for name in node.input)
    convs: Dict[str, Any] = {}  # blocked convolutions without activation, by output
    fused: List[Any] = []
    for node in nodes:
        conv = next((convs[name] for name in node.input if name in convs and uses[name] == 1), None)
        if node.op_type == 'Add' and conv is not None and len(conv.input) < 4:
            fused.remove(conv)  # it has to wait for what it adds
            conv.input.extend([''] * (3 - len(conv.input)) + [name for name in node.input if name != conv.output[0]])
        elif node.op_type == 'Relu' and conv is not None:
            fused.remove(conv)
            conv.attribute.append(helper.make_attribute('activation', 'Relu'))
        else:
            conv = node
        conv.output[:] = node.output
        fused.append(conv)
        if conv.domain == NCHWC and conv.op_type == 'Conv' and all(a.name != 'activation' for a in conv.attribute):
            convs[conv.output[0]] = conv
    return fused

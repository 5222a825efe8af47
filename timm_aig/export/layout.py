"""Rows of samples in ONNX Runtime's own layout, without reordering them at the edges of each block.

ONNX Runtime lays out activations in blocks of channels for its convolutions, and reorders them before and behind every
other operator. GatherND and ScatterND here copy whole samples, Add and ReLU work element by element: to them the layout
does not matter, and the reorders can go. Time over the static parent, ResNet-50, 2 cores, with all gates open and with
half of them: 1.08 and 0.62 at batch 1 rather than 1.12 and 0.63, 1.09 and 0.62 at batch 8 rather than 1.20 and 0.65.
"""
from collections import Counter
from typing import Any, Dict, List, Set

__all__ = ['remove_reorders']

NCHWC = 'com.microsoft.nchwc'  # ONNX Runtime's operators on tensors in blocks of channels
ANY_LAYOUT = {'Add': (0, 1), 'GatherND': (0,), 'Relu': (0,), 'ScatterND': (0, 2)}  # and which inputs are activations


def remove_reorders(graph: Any) -> bool:
    """Remove the reorders of a graph that ONNX Runtime has optimised, in place, and fuse sums into convolutions.

    Returns:
        Whether there were any and no operator needs the plain layout. If not, the graph is of no more use.
    """
    blocked: Set[str] = set()
    pooled: Set[str] = set()  # one pixel: the same in both layouts
    renamed: Dict[str, str] = {}
    nodes: List[Any] = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        source, output = (*node.input, '')[0], node.output[0]
        if node.op_type in ('ReorderInput', 'ReorderOutput'):
            channels = next((a.i for a in node.attribute if a.name == 'channels'), 0)
            if source not in blocked | pooled or channels % 16:  # the blocks have 8 or 16 channels
                return False
            renamed[output] = source
            continue
        if node.op_type == 'GlobalAveragePool' and (source in blocked or node.domain == NCHWC):
            node.domain = NCHWC
            pooled.add(output)
        elif node.domain == NCHWC:
            blocked.add(output)
        elif blocked.intersection(node.input):
            activations = ANY_LAYOUT.get(node.op_type, ())
            if not activations or not all(node.input[i] in blocked for i in activations):
                return False
            blocked.add(output)
        elif pooled.intersection(node.input) and node.op_type != 'Reshape':
            return False
        nodes.append(node)
    # The shapes of the layout, without which ONNX Runtime would not reuse memory in place. Others may be wrong.
    shapes = [value for value in graph.value_info if value.name in blocked]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(_fuse(nodes))
    graph.value_info.extend(shapes)
    return bool(renamed)


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

"""Branches of an ONNX graph: laid out side by side for a tool that takes static graphs only, and put back."""
from graphlib import TopologicalSorter
from typing import Any, Dict, Iterable, List, NamedTuple, Set, Tuple

try:
    import onnx
    from onnx import helper
except ImportError as e:
    raise ImportError(f"ONNX files need pip install 'timm_aig[export]' ({e}).") from e

__all__ = ['Branch', 'NCHWC', 'inline_branches', 'restore_branches', 'sorted_nodes', 'subgraphs']


NCHWC = 'com.microsoft.nchwc'  # ONNX Runtime's operators on tensors in blocks of channels


class Branch(NamedTuple):
    """An `If` whose branches were laid out.

    Args:
        name: Of the node.
        condition: Tensor that decides.
        outputs: What the node gave.
        then: The same, as the open branch gives it.
        otherwise: The same, as the closed branch gives it.
        merged: What the rest of the static graph goes on with.
    """
    name: str
    condition: str
    outputs: Tuple[str, ...]
    then: Tuple[str, ...]
    otherwise: Tuple[str, ...]
    merged: Tuple[str, ...]


def inline_branches(model: Any, select: bool = False) -> Tuple[Any, List[Branch]]:
    """Lay out the branches of a model, which then runs all of them.

    Conditions and what the branches give become outputs of the graph, behind its own, so that no tool removes them.

    Args:
        model: onnx.ModelProto with `If` nodes in its main graph, none inside a branch.
        select: Go on with what the condition asks for, rather than always with what the open branches give.

    Returns:
        A static model, and the branches in order.
    """
    static = onnx.ModelProto()
    static.CopyFrom(model)
    graph = static.graph
    branches: List[Branch] = []
    renamed: Dict[str, str] = {}
    nodes: List[Any] = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type != 'If':
            nodes.append(node)
            continue
        results = {}
        for attribute in node.attribute:
            prefix = f'{node.name}.{attribute.name}.'
            inner = {name: prefix + name for n in attribute.g.node for name in n.output}
            for n in attribute.g.node:
                n.name = prefix + n.name
                n.input[:] = [inner.get(name, renamed.get(name, name)) for name in n.input]
                n.output[:] = [inner[name] for name in n.output]
                if n.op_type == 'Identity':  # a tensor from outside, handed through
                    inner.update((name, n.input[0]) for name, new in inner.items() if new == n.output[0])
                else:
                    nodes.append(n)
            results[attribute.name] = tuple(inner[output.name] for output in attribute.g.output)
        outputs = tuple(node.output)
        then, otherwise = results['then_branch'], results['else_branch']
        branches.append(Branch(node.name, node.input[0], outputs, then, otherwise, outputs if select else then))
        if select:
            nodes.extend(
                helper.make_node('Where', [node.input[0], *pair], [output], name=f'{node.name}.{output}')
                for *pair, output in zip(then, otherwise, outputs))
        else:
            renamed.update(zip(outputs, then))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)

    types = {branch.condition: onnx.TensorProto.BOOL for branch in branches}
    for output in graph.output:
        output.name = renamed.get(output.name, output.name)
    known = {*(output.name for output in graph.output), *(value.name for value in graph.input)}
    exposed = [name for branch in branches for name in (branch.condition, *branch.then, *branch.otherwise)]
    for name in dict.fromkeys(exposed):
        if name not in known:
            graph.output.append(helper.make_tensor_value_info(name, types.get(name, onnx.TensorProto.FLOAT), None))
    return static, branches


def restore_branches(static: Any, branches: List[Branch], model: Any) -> Any:
    """Undo inline_branches on what a tool made of the static graph: each node that only one branch needs, into it.

    A tensor that ONNX Runtime keeps in its blocked layout passes in and out of branches as it is.

    Args:
        static: onnx.ModelProto with the outputs of the one that inline_branches returned.
        branches: As it returned them.
        model: The model that it was given.

    Returns:
        A model with the inputs and outputs of `model`.
    """
    restored = onnx.ModelProto()
    restored.CopyFrom(static)
    graph = restored.graph
    producers = {name: node for node in graph.node for name in node.output}
    blocked = _blocked_tensors(branches, producers)
    after: Dict[str, str] = {}  # what the rest of the graph takes for a tensor of the open branch
    reordered: Dict[str, str] = {}  # tensors that leave a branch as they are, and the name of their blocked form
    ends: Set[str] = set()  # where the search for what a branch needs stops: what earlier branches give
    bodies: List[Tuple[Branch, List[str], List[str]]] = []
    needed_by: Dict[int, List[Tuple[str, str]]] = {}

    def note(body: Tuple[str, str], names: Iterable[str]) -> None:
        todo = [name for name in names if name not in ends]
        while todo:
            node = producers.get(todo.pop())
            if node is None or body in needed_by.setdefault(id(node), []):
                continue
            needed_by[id(node)].append(body)
            todo.extend(name for name in node.input if name not in ends)

    for branch in branches:
        note(('', ''), [branch.condition])
        then, otherwise = ([blocked.get(name, name) for name in names] for names in (branch.then, branch.otherwise))
        note((branch.name, 'then_branch'), then)
        note((branch.name, 'else_branch'), otherwise)
        for name in branch.then:
            source = producers[name].input[0] if producers[name].op_type == 'ReorderOutput' else ''
            if source and name not in blocked:  # what goes on with the blocked form has to make it again
                ends.add(source)
                after[source] = reordered[name] = f'{name}.blocked'
        merged = [blocked.get(name, name) for name in branch.merged]
        ends.update(merged)
        after.update((name, f'{branch.name}.{i}') for i, name in enumerate(merged))
        bodies.append((branch, then, otherwise))
    own = [output.name for output in graph.output][:len(model.graph.output)]
    note(('', ''), own)

    inside: Dict[Tuple[str, str], List[Any]] = {}
    nodes = [helper.make_node('ReorderInput', [after[plain]], [new], domain=NCHWC) for plain, new in reordered.items()]
    for node in graph.node:
        needed = needed_by.get(id(node), [])
        if len(needed) == 1 and needed[0] != ('', ''):
            inside.setdefault(needed[0], []).append(node)
        elif needed:
            nodes.append(node)
    for node in [*nodes, *(n for body in inside.values() for n in body)]:
        local = {name for n in inside.get((needed_by[id(node)] + [('', '')])[0], []) for name in n.output}
        node.input[:] = [name if name in local else after.get(name, name) for name in node.input]
    for branch, then, otherwise in bodies:
        graphs = {}
        for key, names in (('then_branch', then), ('else_branch', otherwise)):
            body = inside.get((branch.name, key), [])
            local = {name for n in body for name in n.output}
            outputs = []
            for name in names:
                if name not in local:
                    body = [*body, helper.make_node('Identity', [after.get(name, name)], [f'{branch.name}.{name}'])]
                    name = f'{branch.name}.{name}'
                outputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
            graphs[key] = helper.make_graph(body, f'{branch.name}.{key}', [], outputs)
        nodes.append(helper.make_node(
            'If', [branch.condition], [f'{branch.name}.{i}' for i in range(len(then))], name=branch.name, **graphs))
    nodes = sorted_nodes(nodes)
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.output.extend(model.graph.output)
    for name, output in zip(own, model.graph.output):
        if after.get(name, name) != output.name:
            graph.node.append(helper.make_node('Identity', [after.get(name, name)], [output.name]))
    return restored


def _blocked_tensors(branches: List[Branch], producers: Dict[str, Any]) -> Dict[str, str]:
    """The blocked form of each tensor that both branches, where they give it, have in blocked form."""
    blocked = {
        name: producers[name].input[0]
        for branch in branches for name in (*branch.then, *branch.otherwise)
        if name in producers and producers[name].op_type == 'ReorderOutput'}
    pairs = [pair for branch in branches for pair in zip(branch.then, branch.otherwise)]
    while mixed := [name for pair in pairs if sum(n in blocked for n in pair) == 1 for name in pair if name in blocked]:
        for name in mixed:
            blocked.pop(name, None)
    return blocked


def _inputs(node: Any) -> Set[str]:
    """Tensors from outside that a node and its branches take."""
    names = set(node.input)
    for attribute in node.attribute:
        local = {name for n in attribute.g.node for name in n.output}
        names.update(name for n in attribute.g.node for name in n.input if name not in local)
    return names


def sorted_nodes(nodes: List[Any]) -> List[Any]:
    """Nodes in an order in which each node comes after those that it takes from."""
    producers = {name: i for i, node in enumerate(nodes) for name in node.output}
    order = TopologicalSorter(
        {i: {producers[name] for name in _inputs(node) if name in producers} for i, node in enumerate(nodes)})
    return [nodes[i] for i in order.static_order()]


def subgraphs(graph: Any) -> List[Any]:
    """A graph and the branches in it."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField('g')]
    return [graph, *(g for branch in inner for g in subgraphs(branch))]

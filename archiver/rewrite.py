"""Rewrites of OpenVINO graphs that answer the same in less time or memory."""

import numpy as np
import openvino
from openvino import Input, Node, Output, opset13

# What these compute of a token depends on no other token, if their other inputs are constants.
_ELEMENTWISE = {"Add", "Subtract", "Multiply", "Divide", "Gelu", "Relu", "Sigmoid", "Swish", "Tanh"}


def select_early(model: openvino.Model) -> openvino.Model:
    """The model, changed in place, with the token that its head looks at selected as early as it can be.

    A classifier reads one token of the last hidden state, `hidden_state[:, 0]`. What the last layer computes of each
    token by itself, its feed-forward network most of all, need not be computed for the others.
    """
    operations = model.get_ordered_ops()
    for gather in operations:
        if not _selects_a_token(gather):
            continue
        # Backwards from the selection: what nothing else looks at, and works on each token by itself.
        selected: dict[str, list[Input]] = {}
        for operation in reversed(operations):
            readers = {port.get_node().get_name() for out in operation.outputs() for port in out.get_target_inputs()}
            if readers and readers <= {gather.get_name(), *selected}:
                ports = _token_inputs(operation)
                if ports:
                    selected[operation.get_name()] = ports
        source = gather.input_value(0)
        if source.get_node().get_name() not in selected:
            continue
        index = opset13.constant(gather.input_value(1).get_node().data.reshape(1).astype(np.int64))
        axis = opset13.constant(np.int64(1))
        for ports in selected.values():
            for port in ports:
                if port.get_source_output().get_node().get_name() not in selected:
                    port.replace_source_output(opset13.gather(port.get_source_output(), index, axis).output(0))
        gather.output(0).replace(opset13.squeeze(source, axis).output(0))
    model.validate_nodes_and_infer_types()
    return model


def look_up_in_int8(model: openvino.Model) -> openvino.Model:
    """The model, changed in place, with int8 embeddings looked up first and dequantized then, to the same numbers.

    NNCF dequantizes the table. OpenVINO does that as it loads, so each compiled model would hold a table of fp32.
    """
    for gather in model.get_ops():
        if gather.get_type_name() != "Gather" or not _is_number(gather.input_value(2), 0):
            continue
        multiply = gather.input_value(0).get_node()
        if multiply.get_type_name() != "Multiply":
            continue
        convert, scale = (multiply.input_value(port).get_node() for port in (0, 1))
        table = convert.input_value(0) if convert.get_type_name() == "Convert" else None
        if table is None or table.get_element_type() != openvino.Type.i8 or scale.get_type_name() != "Constant":
            continue
        indices, axis = gather.input_value(1), gather.input_value(2)
        rows = opset13.convert(opset13.gather(table, indices, axis), multiply.get_output_element_type(0).to_string())
        # One scale for each row of the table, or one for all.
        per_row = scale.get_output_shape(0)[:1] == table.get_shape()[:1]
        scales = opset13.gather(scale, indices, axis) if per_row else scale
        gather.output(0).replace(opset13.multiply(rows, scales).output(0))
    model.validate_nodes_and_infer_types()
    return model


def _selects_a_token(operation: Node) -> bool:
    """Whether it is `hidden_state[:, n]` of an array of [rows, tokens, size]."""
    return (
        operation.get_type_name() == "Gather"
        and _is_hidden_state(operation.input_value(0))
        and _is_number(operation.input_value(1))
        and _is_number(operation.input_value(2), 1)
    )


def _token_inputs(operation: Node) -> list[Input]:
    """The hidden states that an operation works on token by token; empty if that is not how it works."""
    if operation.get_output_size() != 1 or not _is_hidden_state(operation.output(0)):
        return []
    ports = operation.inputs()
    sources = [port.get_source_output() for port in ports]
    match operation.get_type_name():
        case "MatMul":  # a linear layer
            alike = [_is_hidden_state(sources[0]), _is_constant(sources[1]) and len(sources[1].get_shape()) == 2]
            return ports[:1] if all(alike) and not operation.get_attributes()["transpose_a"] else []
        case "MVN":  # layer normalization
            axes = sources[1].get_node()
            last = axes.get_type_name() == "Constant" and axes.data.tolist() in ([-1], [2])
            return ports[:1] if last else []
        case kind if kind in _ELEMENTWISE:
            states = [port for port in ports if not _is_the_same_for_all_tokens(port.get_source_output())]
            return states if all(_is_hidden_state(port.get_source_output()) for port in states) else []
    return []


def _is_hidden_state(output: Output) -> bool:
    """Whether it is an array of [rows, tokens, size], of which the size is known and the rows are not."""
    shape = output.get_partial_shape()
    return shape.rank.is_static and len(shape) == 3 and shape[0].is_dynamic and shape[2].is_static


def _is_the_same_for_all_tokens(output: Output) -> bool:
    """Whether it is a constant with at most one axis, the last, of more than one entry."""
    return _is_constant(output) and all(size == 1 for size in output.get_shape()[:-1])


def _is_constant(output: Output) -> bool:
    """Whether it is a constant, maybe one that is stored in another type."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _is_number(output: Output, number: int | None = None) -> bool:
    """Whether it is a constant of no axes; this one, if one is given."""
    node = output.get_node()
    scalar = node.get_type_name() == "Constant" and node.data.ndim == 0
    return scalar and number in (None, node.data.item())

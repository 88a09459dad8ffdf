"""Graphs that answer the same in less time or memory."""

import zipfile
from pathlib import Path

import numpy as np
import openvino
import pytest
from conftest import build_here
from openvino import opset13

from archiver import rewrite
from handler.backends.openvino import MODEL_FILE


def of(model: openvino.Model, kind: str) -> list[openvino.Node]:
    """The operations of one kind."""
    return [operation for operation in model.get_ops() if operation.get_type_name() == kind]


def tokens_of(model: openvino.Model) -> set[int]:
    """How many tokens the linear layers see; -1 stands for all of them."""
    shapes = [layer.input(0).get_partial_shape() for layer in of(model, "MatMul")]
    return {-1 if shape[1].is_dynamic else shape[1].get_length() for shape in shapes if len(shape) == 3}


def classifier(chance: np.random.Generator, *, tokens_too: bool = False, position: bool = False) -> openvino.Model:
    """The last layer of a transformer and a head that looks at the first token.

    tokens_too: another output has the hidden state. position: what is added differs from token to token.
    """

    def weights(*shape: int) -> openvino.Node:
        return opset13.constant(chance.normal(size=shape).astype(np.float32))

    hidden = opset13.parameter([-1, -1, 8], np.float32)
    mixed = opset13.softmax(hidden, axis=1)  # as in attention, tokens look at one another
    wide = opset13.gelu(opset13.add(opset13.matmul(mixed, weights(32, 8), False, True), weights(1, 1, 32)), "erf")
    narrow = opset13.matmul(wide, weights(8, 32), False, True)
    residual = opset13.add(narrow, mixed)
    if position:
        residual = opset13.add(residual, weights(1, 5, 8))
    normal = opset13.mvn(residual, opset13.constant([-1]), True, 1e-5, "inside_sqrt")
    last = opset13.add(opset13.multiply(normal, weights(1, 1, 8)), weights(8))
    first = opset13.gather(last, opset13.constant(0), opset13.constant(1))
    logits = opset13.matmul(first, weights(3, 8), False, True)
    return openvino.Model([logits, *([last] if tokens_too else [])], [hidden])


@pytest.mark.parametrize(
    ("options", "tokens_of_linear_layers"),
    [({}, {1}), ({"position": True}, {-1}), ({"tokens_too": True}, {-1})],
)
def test_a_head_that_looks_at_one_token(options: dict[str, bool], tokens_of_linear_layers: set[int]) -> None:
    hidden = np.random.default_rng(1).normal(size=(4, 5, 8)).astype(np.float32)
    expected = openvino.compile_model(classifier(np.random.default_rng(0), **options), "CPU")(hidden)
    model = rewrite.select_early(classifier(np.random.default_rng(0), **options))
    found = openvino.compile_model(model, "CPU")(hidden)
    for before, after in zip(expected.values(), found.values(), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)
    assert tokens_of(model) == tokens_of_linear_layers


def test_the_last_layer_of_an_archive_sees_one_token(tiny_bundle: Path, tmp_path: Path) -> None:
    build_here(tiny_bundle, tmp_path, "small", backend="openvino", precision="fp32")
    with zipfile.ZipFile(tmp_path / "small.mar") as archive:
        archive.extractall(tmp_path)
    assert tokens_of(openvino.Core().read_model(tmp_path / MODEL_FILE)) == {-1, 1}


@pytest.mark.parametrize("scales", [(50, 1), (1, 1)])
def test_embeddings_are_looked_up_in_int8(scales: tuple[int, int]) -> None:
    chance = np.random.default_rng(0)
    table = opset13.constant(chance.integers(-127, 128, (50, 8), dtype=np.int8))
    dequantized = opset13.multiply(opset13.convert(table, "f32"), opset13.constant(chance.random(scales, np.float32)))
    input_ids = opset13.parameter([-1, -1], np.int64)
    embeddings = opset13.gather(dequantized, input_ids, opset13.constant(0))
    model = openvino.Model([opset13.add(embeddings, embeddings)], [input_ids])
    ids = chance.integers(0, 50, (3, 4))
    [expected] = openvino.compile_model(model, "CPU")(ids).values()
    [found] = openvino.compile_model(rewrite.look_up_in_int8(model), "CPU")(ids).values()
    np.testing.assert_array_equal(found, expected)
    assert openvino.Type.i8 in {operation.input(0).get_element_type() for operation in of(model, "Gather")}

"""The exported graph gives every integer of every tensor: onnxruntime at each optimisation level, and onnx.reference."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from rqtool.errors import ConfigError, InputError
from rqtool.export.layout import Layout
from rqtool.export.onnx import to_onnx, value_info
from rqtool.program import golden
from rqtool.program.ir import Program
from programs import CASES, Builder, images, layer_program, network, random_layer

LEVELS = [onnxruntime.GraphOptimizationLevel(v) for v in (0, 1, 2, 99)]
BODIES = ("qlinear", "explicit")


def with_all_tensors(program: Program, model: onnx.ModelProto) -> onnx.ModelProto:
    full = onnx.ModelProto()
    full.CopyFrom(model)
    full.graph.output.extend(value_info(program.tensors[op.output]) for op in program.ops if op.output != program.output)
    return full


def session(model: onnx.ModelProto, level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads, options.log_severity_level = level, 1, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_equal(program: Program, body: str, n: int = 2) -> None:
    """Every tensor of `program` on n images: dtype, shape and integers."""
    x = images(program, n)
    want = golden.run(program, x)
    model = to_onnx(program, body)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    full = with_all_tensors(program, model)
    names = [o.name for o in full.graph.output]
    runs = [session(full, level).run(None, {program.input: x}) for level in LEVELS] + [ReferenceEvaluator(full).run(None, {program.input: x})]
    for values in runs:
        for name, value in zip(names, values):
            assert value.dtype == program.tensors[name].dtype and np.array_equal(value, want[name]), name
    assert np.array_equal(session(model, LEVELS[3]).run(None, {program.input: x})[0], want[program.output])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_read_is_exact(case: str, body: str) -> None:
    assert_equal(layer_program(CASES[case], seed=1), body)


@pytest.mark.parametrize("seed", range(40))
def test_random_layers_are_exact(seed: int) -> None:
    assert_equal(random_layer(seed), BODIES[seed % 2])


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_whole_networks_are_exact(seed: int, floats: bool) -> None:
    assert_equal(network(seed, floats=floats), BODIES[seed % 2], n=3)

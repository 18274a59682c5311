"""Which carrier runs a call: fused numba on CPUs where float32 is exact, chunked torch everywhere
else."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch.nn import functional as F

from rqtool.kernels import reference
from rqtool.kernels.spec import ReadSpec, Tables
from rqtool.mapping.plan import Plan

FLOAT32_WHOLE = 1 << 24  # float32 holds every whole number below
VECTOR = 16  # positions of a column, from which on our own loops over them are fast


class Fused:
    """kernels/cpu.py over torch tensors, on torch's own number of threads."""

    name = "fused (numba)"

    @staticmethod
    def keep(x: torch.Tensor) -> torch.Tensor:
        """Input codes as both passes take them: uint8."""
        return x.to(torch.uint8)

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec) -> torch.Tensor:
        from rqtool.kernels import cpu  # numba takes half a second to import

        return torch.from_numpy(
            cpu.forward(_array(x), _array(weight), spec, torch.get_num_threads())
        )

    @staticmethod
    def backward(
        x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec, gy: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        from rqtool.kernels import cpu

        return tuple(
            map(
                torch.from_numpy,
                cpu.backward(_array(x), _array(weight), spec, _array(gy), torch.get_num_threads()),
            )
        )


class Chunked:
    """kernels/reference.py, in the dtype of its input."""

    name = "chunked (torch)"
    keep = staticmethod(lambda x: x)
    forward, backward = staticmethod(reference.forward), staticmethod(reference.backward)


def _array(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().numpy())


def numba_failure() -> str | None:
    """Why the fused kernels cannot run here, None where they can."""
    return "numba is not installed" if find_spec("numba") is None else _compile_failure()


@lru_cache(maxsize=1)
def _compile_failure() -> str | None:
    """What numba or LLVM say to the smallest kernel."""
    try:
        from rqtool.kernels import certify

        certify.codes(np.zeros(1), 1.0, 0.0, 1.0)
    except Exception as e:  # whatever they meet on this machine
        return (
            f"numba cannot compile here ({type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else 'no reason given'})"
        )
    return None


def numba_available() -> bool:
    return numba_failure() is None


def for_training(x: torch.Tensor, spec: ReadSpec) -> type[Fused] | type[Chunked]:
    """The carrier of a float32 training step; noise needs the fused one, so on other devices it is
    drawn by the chunked one."""
    return (
        Fused
        if x.device.type == "cpu" and x.dtype == torch.float32 and numba_available()
        else Chunked
    )


def every_code(p: np.ndarray, mult: int, shift: int, lo: int, hi: int) -> list[np.ndarray]:
    """code - zero of whole-number partial sums p, once by each form in float32 or 16 bits that an
    exact call may take here."""
    if not numba_available():
        return [reference.codes(p, mult, shift, lo, hi)]
    from rqtool.kernels import certify

    return certify.every_code(p, mult, shift, lo, hi)


def every_level(p: np.ndarray, spec: ReadSpec) -> list[np.ndarray]:
    """The same for free levels, where what is not a look-up in the table of `spec` itself."""
    if not numba_available():
        return []
    from rqtool.kernels import certify

    return certify.every_level(p, spec)


class Exact:
    """The reads of one weight plane on codes of one input plane, exactly: fused, or chunked
    float32, where certified and in bounds, else chunked float64.

    weight: [O, K] of one weight plane; the padding of the spec's geometry is put around the input.
    """

    def __init__(self, weight: torch.Tensor, spec: ReadSpec, plan: Plan, certified: bool) -> None:
        self.weight, self.spec = weight, spec
        self.small = certified and max(plan.acc_bound, plan.macro.p_max) < FLOAT32_WHOLE
        self.prepared = self._prepare() if self.small and numba_available() else None

    def _prepare(self):
        from rqtool.kernels import cpu

        return cpu.Prepared(_array(self.weight), self.spec)

    def __call__(self, x: torch.Tensor, pad: int) -> torch.Tensor:
        """acc int32 [N, O, H_out, W_out] from whole-number codes [N, C, H, W], padded with code
        `pad`."""
        if self.prepared is not None and x.device.type == "cpu":
            from rqtool.kernels import cpu

            return torch.from_numpy(
                cpu.run(
                    self.prepared,
                    _array(Fused.keep(x)),
                    torch.get_num_threads(),
                    pad=pad,
                    dtype=np.int32,
                )
            )
        dtype, (down, right) = (
            torch.float32 if self.small else torch.float64,
            self.spec.geometry.padding,
        )
        spec = replace(self.spec, geometry=replace(self.spec.geometry, padding=(0, 0)))
        return Chunked.forward(
            F.pad(x.to(dtype), (right, right, down, down), value=pad), self.weight.to(dtype), spec
        ).int()


def requant(
    xs: tuple[torch.Tensor, ...],
    mults: list[torch.Tensor],
    add: torch.Tensor,
    shift: int,
    lo: int,
    hi: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """clamp((add + sum of x * mult) >> shift, lo, hi) in the type of `add`, in one pass over memory
    where numba compiles for the device."""
    if xs[0].device.type == "cpu" and numba_available():
        from rqtool.kernels.requant import requant as in_one_pass

        kind = {torch.uint8: np.uint8, torch.int32: np.int32}[dtype]
        return torch.from_numpy(
            in_one_pass(
                [_array(x) for x in xs],
                [_array(m) for m in mults],
                _array(add),
                shift,
                lo,
                hi,
                kind,
                torch.get_num_threads(),
            )
        )
    total = add
    for x, mult in zip(xs, mults):
        total = total + x.to(add.dtype) * mult
    return (total >> shift).clamp(lo, hi).to(dtype)


def _one_pass(*tensors: torch.Tensor) -> bool:
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and numba_available()
    )


def codes_gradient(
    x: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, sum of grad * u) over the numbers with low <= u <= high, u = x / scale; dx = grad /
    scale there, 0 elsewhere. In one pass over memory where numba compiles for the device."""
    if _one_pass(x, grad):
        from rqtool.kernels import gradients

        dx, total = gradients.codes(
            _array(x), _array(grad), float(scale), low, high, torch.get_num_threads()
        )
        return torch.from_numpy(dx), x.new_tensor(total)
    u = x / scale
    dx = torch.where((u >= low) & (u <= high), grad, grad.new_zeros(()))
    return dx / scale, torch.dot(dx.flatten(), u.flatten())


def table_gradient(
    x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec, gy: torch.Tensor
) -> torch.Tensor:
    """`reference.table_gradient`, with the counting in one pass, as above."""
    return reference.table_gradient(
        x, weight, spec, gy, _count if _one_pass(x, weight, gy) else reference.count
    )


def _count(p: torch.Tensor, grad: torch.Tensor, tables: Tables, total: torch.Tensor) -> None:
    from rqtool.kernels import gradients

    gradients.count(_array(p), _array(grad), tables.row, tables.p_min, total.numpy())


def outputs_gradient(
    gy: torch.Tensor, v: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gy * scale, sum of gy, sum of gy * v), for gy, v [N, O, H, W] and scale [O]; the sums [O].
    In one pass, as above."""
    if _one_pass(gy, v, scale) and gy.shape[2:].numel() >= VECTOR:
        from rqtool.kernels import gradients

        dy, *sums = (
            torch.from_numpy(a)
            for a in gradients.outputs(
                _array(gy), _array(v), _array(scale), torch.get_num_threads()
            )
        )
        return dy, *(s.float() for s in sums)
    return (
        gy * scale.view(1, -1, 1, 1),
        gy.sum((0, 2, 3)),
        (gy * v).sum((0, 2, 3)),
    )  # an einsum of this is twenty times slower

"""rqtool export: the integer program of a .rq file as ONNX, proved equal to the definition."""

from __future__ import annotations

from typing import Annotated, Any

import rqtool
from rqtool.cli import values
from rqtool.cli.options import Force, argument, option, shows
from rqtool.cli.progress import make_progress
from rqtool.errors import ConfigError
from rqtool.report import results


@shows(results.exported)
def export(
    rq: Annotated[str, argument(metavar="RQ", help="A file that rqtool quantize wrote.")],
    file: Annotated[
        str | None,
        argument(metavar="[FILE]", help="The file to write (default: beside RQ, ending in .onnx)."),
    ] = None,
    onnx: Annotated[
        bool,
        option(
            "--onnx", help="Write ONNX, the only format so far; the name of the file may follow."
        ),
    ] = False,
    out: Annotated[str | None, option("--out", metavar="FILE", help="The same as [FILE].")] = None,
    body: Annotated[
        str,
        option(
            "--body",
            metavar="qlinear|explicit",
            help="Fast, or with partial sums as tensors (default qlinear).",
        ),
    ] = "qlinear",
    no_verify: Annotated[
        bool, option("--no-verify", help="Do not prove the file equal to the definition first.")
    ] = False,
    data: Annotated[
        str | None,
        option("--data", metavar="SRC", help="Images to prove it on (default: random pixels)."),
    ] = None,
    images: Annotated[
        str, option("--images", metavar="N", help="How many of them (default 8).")
    ] = "8",
    vectors: Annotated[
        str | None,
        option(
            "--vectors",
            metavar="DIR",
            help="Also write golden vectors of every tensor for the same images.",
        ),
    ] = None,
    force: Force = False,
) -> dict[str, Any]:
    """Write the integer program as ONNX.

    The file carries metadata about every read. Unless --no-verify is given, it is first proved that
    no integer of any tensor differs from the definition.
    """
    rq, target = named(rq, file, out)
    count = values.whole("--images", images)
    return rqtool.export_onnx(
        rq,
        target,
        body=body,
        verify=not no_verify,
        data=data,
        images=count,
        vectors=vectors,
        force=force,
        progress=make_progress(),
    ).to_json()


def named(first: str, second: str | None, out: str | None) -> tuple[str, str | None]:
    """(the .rq file, the file to write), in whichever order the two stand around --onnx.

    >>> named("out.onnx", "m.rq", None), named("m.rq", None, "out.onnx")
    (('m.rq', 'out.onnx'), ('m.rq', 'out.onnx'))
    """
    if second is not None and out is not None:
        raise ConfigError("--out and a file after --onnx both name what to write; give one of them")
    if second is not None and second.endswith(".rq") and not first.endswith(".rq"):
        first, second = second, first
    return first, second or out

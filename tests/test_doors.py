"""The doors through which models come in: forms of checkpoints, spellings of --arch, and what a
model may do while it is read."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import gzip
import json
import os
import pathlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from rqtool.cli.main import run
from rqtool.errors import ConfigError, InputError, RqError
from rqtool.hardware.macro import make_macro
from rqtool.model.load import load_model, state_of

HERE = "test_doors"


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )


def sized(classes: int, width: float = 1.0, *, name: str = "") -> nn.Module:
    return nn.Linear(int(2 * width), classes)


class Maker:
    @staticmethod
    def make() -> nn.Module:
        return small()

    class Inner:
        @classmethod
        def make(cls) -> nn.Module:
            return small()


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*small())


class Colour(enum.Enum):
    RED = 1


class Config:
    def __init__(self) -> None:
        self.depth = 3


class Words(dict):
    pass


NUMBER = 3


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    monkeypatch.chdir(tmp_path)


def trained() -> dict[str, torch.Tensor]:
    net = small()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    return net.state_dict()


def averaged() -> dict[str, torch.Tensor]:
    return {k: v + 1 if v.is_floating_point() else v for k, v in trained().items()}


def saved(held: object, name: str = "m.pt", **options: object) -> str:
    torch.save(held, name, **options)
    return name


def prefixed(prefix: str, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in (state or trained()).items()}


def read(
    source: str,
    want: dict[str, torch.Tensor] | None = None,
    arch: str = f"{HERE}:small",
    **chosen: str,
) -> list[str]:
    """The file gives exactly the trained weights; the sentences that came with them."""
    told: list[str] = []
    state = load_model(source, arch, say=told.append, **chosen).state_dict()
    want = want or trained()
    assert state.keys() == want.keys() and all(
        torch.equal(state[k], want[k].float() if want[k].is_floating_point() else want[k])
        for k in want
    )
    return told


def refusal(
    source: str,
    arch: str | None = f"{HERE}:small",
    error: type[RqError] = InputError,
    **chosen: str,
) -> str:
    with pytest.raises(error) as e:
        load_model(source, arch, **chosen)
    assert type(e.value) is error
    return str(e.value)


# -- what lies beside the weights ------------------------------------------------------------------
BESIDE = {
    "numpy scalar": np.float64(92.1),
    "numpy array": np.arange(4).reshape(2, 2),
    "numpy text": np.array(["a", "b"]),
    "numpy objects": np.array([None, {}], dtype=object),
    "numpy big-endian": np.arange(3, dtype=">f4"),
    "namespace": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
    "path": pathlib.Path("x"),
    "windows path": pathlib.PureWindowsPath("x"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("abc"),
    "ordered": collections.OrderedDict(a=1),
    "date": datetime.datetime(2024, 1, 2),
    "delta": datetime.timedelta(3),
    "size": torch.Size([1, 2]),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "enum": Colour.RED,
    "object": Config(),
    "class": Config,
    "function": small,
    "own dictionary": Words(a=1),
    "set": {1, 2},
    "complex": 1 + 2j,
    "bytes": b"abc",
    "range": range(3),
    "big": 10**50,
    "generator": torch.Generator().get_state(),
    "optimizer": torch.optim.Adam(small().parameters()).state_dict(),
    "layer": nn.LSTM(2, 2),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("new_format", [True, False])
def test_what_lies_beside_the_weights_is_no_hindrance(name, new_format):
    told = read(
        saved(
            {"epoch": 3, "state_dict": trained(), "beside": BESIDE[name]},
            _use_new_zipfile_serialization=new_format,
        )
    )
    assert told == []


@pytest.mark.parametrize(
    "suffix", ["pth.tar", "bin", "ckpt", "model", "", "pkl", "safetensors.bak"]
)
def test_a_file_is_known_by_its_content(suffix):
    read(saved(trained(), f"m.{suffix}"))
    safetensors.torch.save_file(trained(), "other.pt")
    read("other.pt")


def test_weights_that_are_numpy_arrays():
    state = {k: v.numpy() for k, v in trained().items()}
    read(saved({"params": state}))
    for protocol in range(6):
        Path("m.pkl").write_bytes(pickle.dumps(state, protocol))
        read("m.pkl")


@pytest.mark.parametrize(
    "wrap", [dict, collections.OrderedDict, Words, lambda d: collections.defaultdict(list, d)]
)
def test_weights_in_dictionaries_of_other_kinds(wrap):
    read(saved(wrap(trained())))
    read(saved({"model": wrap(trained())}))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"\x89HDF\r\n\x1a\n",
            "is an HDF5 file, as Keras writes it; give a torch or safetensors file",
        ),
        (gzip.compress(b"x"), "is packed with gzip; unpack it and give what is inside"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS, not the file itself; fetch it with git lfs pull",
        ),
        (
            b"<!doctype html><html>",
            "is a web page, not a model; fetch the file that the page links to",
        ),
    ],
)
def test_files_of_other_kinds_are_named(content, sentence):
    Path("m.pt").write_bytes(content)
    assert refusal("m.pt") == f"m.pt: {sentence}"


# -- nothing runs ----------------------------------------------------------------------------------
COMMAND = "touch was_here"
ATTACKS = {
    "reduce": b"cposix\nsystem\n(S'touch was_here'\ntR.",
    "os": b"cos\nsystem\n(S'touch was_here'\ntR.",
    "inst": b"(S'touch was_here'\niposix\nsystem\n.",
    "obj": b"(cposix\nsystem\nS'touch was_here'\no.",
    "newobj": b"\x80\x02cposix\nsystem\nU\x0etouch was_here\x85\x81.",
    "newobj_ex": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch was_here\x85}\x92.",
    "stack_global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch was_here\x85R.",
    "eval": b'cbuiltins\neval\n(S\'__import__("os").system("touch was_here")\'\ntR.',
    "python 2": b'c__builtin__\neval\n(S\'open("was_here", "w")\'\ntR.',
    "build": b"ccollections\nOrderedDict\n)R}(S'__setstate__'\ncposix\nsystem\nubS'touch was_here'\nb.",
    "build a class": b"ctorch\nSize\n}(S'__setstate__'\ncposix\nsystem\nubS'touch was_here'\nb.",
    "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'x'\ntR(S'os'\ntR.",
    "partial": b"cfunctools\npartial\n(cposix\nsystem\nS'touch was_here'\ntR)R.",
    "map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(cposix\nsystem\n(lS'touch was_here'\natRtR.",
    "defaultdict": b"ccollections\ndefaultdict\n(cposix\nsystem\ntR.",
    "nested torch file": b"ctorch.storage\n_load_from_bytes\n(cposix\nsystem\nS'touch "
    b"was_here'\ntRtR.",
    "persistent": b"cposix\nsystem\n(S'touch was_here'\ntRQ.",
    "from type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch\nTensor\n(S'touch was_here'\nt}tR.",
    "copyreg": b"ccopyreg\n_reconstructor\n(cposix\nsystem\ncbuiltins\nobject\nNtR.",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("zipped", [False, True])
def test_hostile_pickles_never_run(name, zipped):
    if zipped:
        import zipfile

        with zipfile.ZipFile("m.pt", "w") as archive:
            archive.writestr("m/data.pkl", ATTACKS[name])
    else:
        Path("m.pt").write_bytes(ATTACKS[name])
    for arch in (None, f"{HERE}:small"):
        assert refusal("m.pt", arch).startswith("m.pt: ")
    with pytest.raises(RqError):
        state_of("m.pt")
    assert not Path("was_here").exists()


def test_sizes_are_checked_before_memory_is_asked_for():
    huge = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(cbuiltins\nbytearray\nI99999999999999\n\x85R)K\x01tR."
    Path("m.pt").write_bytes(huge)
    assert refusal("m.pt") == "m.pt: is not a readable torch file; make or fetch it again"


# -- where the weights are -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "key",
    ["state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params", "ema", "model_ema", "state_dict_ema", "teacher", "student",
     "generator", "module", "my_own_name"],
)  # fmt: skip
def test_wrappers(key):
    read(saved({key: trained(), "epoch": 1}))
    read(saved({"outer": {key: trained()}, "epoch": torch.tensor(3)}))


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "_orig_mod.",
        "encoder.",
        "backbone.",
        "network.",
        "net.",
        "a.b.c.",
        "module.model.",
    ],
)
def test_prefixes(prefix):
    read(saved(prefixed(prefix)))
    safetensors.torch.save_file(prefixed(prefix), "m.safetensors")
    read("m.safetensors")


def test_several_different_weights_are_asked_for():
    path = saved({"model": trained(), "model_ema": averaged()})
    assert refusal(path, error=ConfigError) == (
        "m.pt: holds 2 different sets of weights that fit test_doors:small; "
        "choose one with --weights model or --weights model_ema"
    )
    read(path, weights="model")
    read(path, averaged(), weights="model_ema")
    assert (
        refusal(path, error=ConfigError, weights="model_em")
        == "m.pt: has no weights under 'model_em'; did you mean 'model_ema'?"
    )
    assert refusal(path, arch=None, error=ConfigError) == (
        "m.pt: holds weights without their network; give --arch "
        "package.module:factory or one of demo, lenet"
    )
    with pytest.raises(
        ConfigError,
        match=r"^m\.pt: holds several sets of weights \(model, model_ema\); choose "
        r"one with --weights KEY$",
    ):
        state_of(path)
    assert state_of(path, "model_ema").keys() == trained().keys()


def test_equal_weights_twice_are_no_question():
    read(saved({"model": trained(), "ema": trained()}))


def test_only_what_fits_is_a_choice():
    read(saved({"generator": trained(), "discriminator": nn.Linear(3, 1).state_dict()}))


def test_several_prefixes_are_asked_for():
    path = saved({"state_dict": {**prefixed("student."), **prefixed("teacher.", averaged())}})
    assert refusal(path, error=ConfigError) == (
        "m.pt: holds 2 different sets of weights that fit test_doors:small; "
        "choose one with --weights state_dict --prefix student. or --weights "
        "state_dict --prefix teacher."
    )
    for spelled in ("teacher", "teacher."):
        told = read(path, averaged(), prefix=spelled)
    assert told == [
        "m.pt: 8 tensors beside the weights are not read (student.0.weight, "
        "student.0.bias, student.1.weight, ...); check that the network does "
        "not need them"
    ]
    assert (
        refusal(path, prefix="pupil")
        == "m.pt: does not fit test_doors:small: 8 missing (0.weight, 0.bias, "
        "1.weight, ...); give the network it was trained as"
    )


def test_foreign_entries_are_said_and_own_ones_refused():
    told = read(saved({**prefixed("model."), "criterion.weight": torch.ones(10)}))
    assert told == [
        "m.pt: 1 tensors beside the weights are not read (criterion.weight); "
        "check that the network does not need them"
    ]
    told = read(saved({**trained(), "acc": 92.1}))
    assert told == [
        "m.pt: 1 entries among the weights are no tensors and are not read "
        "(acc); check that the network does not need them"
    ]
    assert read(saved({**trained(), "total_ops": torch.tensor([1.0])})) != []
    for name in ("5.weight", "4.extra", "scale"):
        assert (
            refusal(saved({**trained(), name: torch.ones(3)}))
            == f"m.pt: does not fit test_doors:small: 1 unexpected ({name}); give "
            "the network it was trained as"
        )
    state = trained()
    del state["4.bias"]
    assert (
        refusal(saved(state))
        == "m.pt: does not fit test_doors:small: 1 missing (4.bias); give the "
        "network it was trained as"
    )


def test_float64_beyond_float32():
    state = {k: v.double() if v.is_floating_point() else v for k, v in trained().items()}
    read(saved(state))
    state["4.bias"][0] = 1e300
    assert (
        refusal(saved(state))
        == "m.pt: 4.bias holds numbers beyond what float32 can; give a network "
        "with weights of ordinary size"
    )


def test_weights_in_several_files():
    names = list(trained())
    files = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    Path("big").mkdir()
    for file, held in files.items():
        safetensors.torch.save_file({k: trained()[k] for k in held}, f"big/{file}")
    table = {k: file for file, held in files.items() for k in held}
    Path("big/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": table}), encoding="utf-8-sig"
    )
    read("big")
    read("big/model.safetensors.index.json")
    Path("big/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../x.safetensors"}})
    )
    assert (
        refusal("big") == "big/model.safetensors.index.json: names files in other folders; "
        "give an index whose files lie beside it"
    )
    Path("big/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**table, "a": "model-1.safetensors"}})
    )
    assert (
        refusal("big") == "big/model.safetensors.index.json: 1 tensors are not in the files it "
        "names (a); fetch all files again"
    )


# -- spellings of --arch ---------------------------------------------------------------------------
CODE = (
    "from torch import nn\nfrom helper import wide\n\n\ndef "
    "make(classes=3, width=1.0):\n    from helper import wide\n\n    "
    "return nn.Linear(wide(width), classes)\n"
)


@pytest.mark.parametrize(
    "spelled",
    [
        "nets/mine_{n}.py:make",
        "./nets/mine_{n}.py:make",
        "{cwd}/nets/mine_{n}.py:make",
        "nets/mine_{n}.py:make()",
        "nets/mine_{n}.py:make(3, width=1.0)",
    ],
)
def test_arch_in_a_file(spelled, tmp_path, request):
    n = abs(hash(request.node.name)) % 10**6
    Path("nets").mkdir()
    Path(f"nets/mine_{n}.py").write_text(CODE)
    Path("nets/helper.py").write_text("def wide(x):\n    return int(2 * x)\n")
    path, before = saved(nn.Linear(2, 3).state_dict()), list(sys.path)
    try:
        assert isinstance(load_model(path, spelled.format(n=n, cwd=tmp_path)), nn.Linear)
    finally:
        for name in ("helper", f"mine_{n}"):
            sys.modules.pop(name, None)
    assert sys.path == before


def test_arch_in_a_file_of_a_package():
    Path("pack_of_doors/sub").mkdir(parents=True)
    Path("pack_of_doors/__init__.py").touch()
    Path("pack_of_doors/sub/__init__.py").touch()
    Path("pack_of_doors/sub/net.py").write_text("from ..base import make\n")
    Path("pack_of_doors/base.py").write_text(
        "from torch import nn\ndef make(): return nn.Linear(2, 3)\n"
    )
    try:
        assert isinstance(
            load_model(saved(nn.Linear(2, 3).state_dict()), "pack_of_doors/sub/net.py:make"),
            nn.Linear,
        )
    finally:
        for name in [n for n in sys.modules if n.startswith("pack_of_doors")]:
            del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    ["small", "small()", "Net", "Net()", "Maker.make", "Maker.Inner.make", "Maker.Inner.make()"],
)
def test_arch_as_function_class_and_method(name):
    read(saved(trained()), arch=f"{HERE}:{name}")


@pytest.mark.parametrize(
    "given", ["(3)", "(classes=3)", "(3, 1.0)", "(3, width=1)", "(3, name='a:b (c)')"]
)
def test_arch_with_arguments(given):
    assert isinstance(
        load_model(saved(nn.Linear(2, 3).state_dict()), f"{HERE}:sized{given}"), nn.Linear
    )


@pytest.mark.parametrize(
    ("arch", "error", "sentence"),
    [
        ("{h}:sized", InputError, "{h}:sized: cannot be called with (), for it takes (classes: " "'int', width: 'float' = 1.0, *, name: 'str' = '') -> " "'nn.Module' "
         "(missing a required argument: 'classes'); give them, as in {h}:sized(classes=...)"),
        ("{h}:small(3)", InputError, "{h}:small: cannot be called with (3), for it takes () -> " "'nn.Module' (too many positional arguments); leave them " "out"),
        ("{h}:sized(open('x'))", ConfigError, "--arch {h}:sized(open('x')): its arguments must " "be plain values; write them as in factory(10, " "width=0.5, name='small')"),
        ("{h}:sized(*[1])", ConfigError, "--arch {h}:sized(*[1]): its arguments must be plain " "values; write them as in factory(10, width=0.5, " "name='small')"),
        ("{h}:sized(3)(4)", ConfigError, "--arch {h}:sized(3)(4): its arguments must be plain " "values; write them as in factory(10, width=0.5, " "name='small')"),
        ("{h}:NUMBER", InputError, "{h}:NUMBER: fails when called without arguments (TypeError: " "'int' object is not callable); run it on its own to see " "where"),
        ("{h}:Maker.mak", InputError, "{h}:Maker.mak: {h} has no 'Maker.mak'; did you mean " "'make'?"),
        ("no/such.py:make", InputError, "no/such.py:make: no/such.py is no file; check its name " "and the folder you are in"),
        ("net.py", ConfigError, "--arch net.py is neither package.module:factory nor a built-in " "network; give net.py:factory, with the name of the function in " "it that returns the network"),
        ("a.b.Net", ConfigError, "--arch a.b.Net is neither package.module:factory nor a " "built-in network; did you mean 'a.b:Net'?"),
        ("resnet18", ConfigError, "--arch resnet18 is neither package.module:factory nor a " "built-in network; give package.module:factory or " "file.py:factory, or one of demo, lenet"),
        ("my-net:make", ConfigError, "--arch my-net:make: my-net is no name of a module; give " "package.module:factory or file.py:factory"),
    ],
)  # fmt: skip
def test_arch_that_cannot_be_used(arch, error, sentence):
    assert refusal(saved(trained()), arch.format(h=HERE), error) == sentence.format(h=HERE)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_arch_of_a_library_that_is_not_there(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    told = refusal(saved(trained()), f"{library}:resnet18")
    assert told.startswith(f"{library}:resnet18: {library} cannot be imported (") and told.endswith(
        f"; install it, for example with pip install {library}"
    )


def test_a_module_that_lacks_another_one():
    Path("needs_more.py").write_text("import no_such_package_at_all\n")
    told = (
        "needs_more:x: needs_more cannot be imported (ModuleNotFoundError: "
        "No module named 'no_such_package_at_all'); install it, for example "
        "with pip install no_such_package_at_all"
    )
    assert refusal(saved(trained()), "needs_more:x") == told


# -- what a model prints ---------------------------------------------------------------------------
PRINTS = """
import atexit, ctypes, os, sys
from torch import nn
print("at import")
os.write(1, b"below python\\n")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        print("made")
        ctypes.CDLL(None).puts(b"in C")
        self.l = nn.Linear(16, 3)
    def forward(self, x):
        print("forward")
        sys.__stdout__.write("the first stdout\\n")
        return self.l(x)
"""


def test_a_model_that_prints_leaves_stdout_to_the_result():
    Path("prints.py").write_text(PRINTS)
    saved(nn.ModuleDict({"l": nn.Linear(16, 3)}).state_dict())
    line = [
        sys.executable,
        "-m",
        "rqtool",
        "plan",
        "m.pt",
        "--arch",
        "prints:Net",
        "--input",
        "16",
        "--json",
    ]
    ran = subprocess.run(line, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["command"] == "plan"
    for said in ("at import", "below python", "made", "in C", "forward", "the first stdout"):
        assert said in ran.stderr
    line[-1:] = []
    assert "at import" not in subprocess.run(line, capture_output=True, text=True).stdout


# -- what is no classifier -------------------------------------------------------------------------
def autoencoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))


def test_an_autoencoder_is_no_classifier(capsys):
    saved(autoencoder().state_dict())
    r = np.random.default_rng(0)
    x = r.normal(size=(200, 64)).astype(np.float32)
    np.savez(
        "d.npz",
        x_train=x[:150],
        y_train=np.arange(150) % 2,
        x_test=x[150:],
        y_test=np.arange(50) % 2,
    )
    line = [
        "quantize",
        "m.pt",
        "--arch",
        f"{HERE}:autoencoder",
        "--data",
        "d.npz",
        "--epochs",
        "0",
        "--no-twin",
    ]
    assert run(line) == 3
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: d.npz: the model gives 64 numbers, as many as it takes, as "
        "an autoencoder does, and names the right one of 2 labels for 0.00 % "
        "of the images, "
        "so it looks like no classifier; give --task classify if it is one"
    )
    assert not Path("m.rq").exists()
    assert run([*line, "--task", "clasify"]) == 2
    assert run([*line, "--task", "classify"]) == 0


# -- text files ------------------------------------------------------------------------------------
def toml(text: str, encoding: str = "utf-8") -> str:
    Path("m.toml").write_bytes(text.encode(encoding))
    return "m.toml"


def test_macro_files_of_windows_editors():
    assert make_macro(toml("[macro]\r\nwl = 12\r\n", "utf-8-sig")).wl == 12
    with pytest.raises(InputError) as e:
        make_macro(toml("[macro]\nwl = 12\n", "utf-16"))
    assert str(e.value) == "m.toml: is written in UTF-16; save it as UTF-8"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "wl = 9\n[macro]\nio = 4\n",
            "has a key 'wl' outside of [macro], which nothing reads; move it below [macro]",
        ),
        (
            "[macro]\nio = 4\n[adc]\nbits = 4\n",
            "has a table [adc], which nothing reads; leave it out, or write it as a comment",
        ),
        ("[macros]\nio = 4\n", "has no [macro] table; did you mean [macro] with [macros]?"),
    ],
)
def test_nothing_in_a_macro_file_is_ignored(text, sentence):
    with pytest.raises(InputError) as e:
        make_macro(toml(text))
    assert str(e.value) == f"m.toml: {sentence}"


def test_helpful_pages_need_no_torch():
    ran = subprocess.run([sys.executable, "-c", "import sys; from rqtool.cli.main import run; " "run(['quantize', '--help']); sys.exit('torch' " "in sys.modules)"],
                         capture_output=True, env={**os.environ})  # fmt: skip
    assert ran.returncode == 0

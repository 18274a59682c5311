"""Model files become networks; nothing in a file runs, and everything else is refused in one
sentence."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rqtool.errors import ConfigError, InputError, RqError
from rqtool.model.data import load_data
from rqtool.model.load import RECORDS, Record, load_model, read_torch
from rqtool.model.zoo import ZOO
from rqtool.storage import write_atomic

WAY_OUT = (
    "save the weights with torch.save(model.state_dict(), FILE) and give "
    "--arch package.module:factory"
)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 2 * 2, 3)
    )


def twins() -> nn.Module:
    """Two layers that share one weight."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return net


def module_inside() -> nn.Module:
    return nn.Sequential(OrderedDict(module=nn.Linear(2, 2)))


READY = tiny()
X = torch.arange(16.0).reshape(1, 1, 4, 4)
HERE = "test_load"  # this module, as --arch names it


@pytest.fixture(autouse=True)
def this_module_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    monkeypatch.chdir(tmp_path)


def saved(obj: object, name: str = "m.pt", **options: object) -> str:
    torch.save(obj, name, **options)
    return name


def refusal(source: str, arch: str | None = None, error: type[RqError] = InputError) -> str:
    with pytest.raises(error) as e:
        load_model(source, arch)
    assert type(e.value) is error
    return str(e.value)


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def loads(source: str, arch: str | None = f"{HERE}:tiny", like: nn.Module | None = None) -> None:
    """The file gives exactly the tiny network (or `like`), with weights changed by `trained`."""
    net = load_model(source, arch)
    assert equal(net, like or trained())
    assert not any(m.training for m in net.modules()) and all(
        p.dtype == torch.float32 for p in net.parameters()
    )


def trained() -> nn.Module:
    net = tiny()
    with torch.no_grad():
        for n, p in enumerate(net.parameters()):
            p.add_(n + 1)
    net[1].running_mean.fill_(0.5)
    return net


# -- state dictionaries ----------------------------------------------------------------------------
def test_a_network_comes_back_as_it_is():
    net = tiny()
    assert load_model(net) is net


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".PT"])
@pytest.mark.parametrize("new_format", [True, False])
def test_torch_files(suffix, new_format):
    loads(saved(trained().state_dict(), "m" + suffix, _use_new_zipfile_serialization=new_format))


def test_safetensors_files():
    safetensors.torch.save_file(trained().state_dict(), "m.safetensors")
    loads("m.safetensors")


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "net", "ema"])
def test_checkpoints(wrapper):
    loads(
        saved(
            {
                "epoch": 3,
                wrapper: trained().state_dict(),
                "best": 0.5,
                "optimizer": {"state": {}, "groups": [1]},
            }
        )
    )


def test_nested_checkpoints():
    loads(saved({"model": {"state_dict": trained().state_dict(), "name": "tiny"}}))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net."]
)
def test_prefixes(prefix):
    loads(saved({prefix + k: v for k, v in trained().state_dict().items()}))


def test_what_training_wrappers_really_save():
    loads(saved(nn.DataParallel(trained()).state_dict()))
    loads(saved(torch.optim.swa_utils.AveragedModel(trained()).state_dict()))


def test_compiled_layers():
    """torch.compile of one layer puts its prefix inside the name."""
    loads(saved({k.replace("0.", "0._orig_mod.", 1): v for k, v in trained().state_dict().items()}))


def test_a_prefix_the_network_has_itself_stays():
    net = module_inside()
    assert equal(load_model(saved(net.state_dict()), f"{HERE}:module_inside"), net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(dtype):
    net = trained().to(dtype)
    loads(saved(net.state_dict()), like=net.float())


def test_weights_without_batch_counts():
    """Checkpoints from before torch 0.4.1 have none."""
    loads(saved({k: v for k, v in trained().state_dict().items() if "num_batches" not in k}))


def test_tied_weights_are_found_under_either_name():
    net = twins()
    for left_out in ("0.weight", "1.weight"):
        safetensors.torch.save_file(
            {k: v.clone() for k, v in net.state_dict().items() if k != left_out}, "m.safetensors"
        )
        back = load_model("m.safetensors", f"{HERE}:twins")
        assert equal(back, net) and back[0].weight is back[1].weight


def test_arch_may_be_a_network_that_exists():
    assert load_model(saved(trained().state_dict()), f"{HERE}:READY") is READY
    assert equal(READY, trained())


def test_arch_from_the_current_folder():
    Path("my_net.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 1)\n")
    path = list(sys.path)
    try:
        assert isinstance(load_model(saved(nn.Linear(2, 1).state_dict()), "my_net:make"), nn.Linear)
    finally:
        sys.modules.pop("my_net", None)
    assert sys.path == path


def test_what_does_not_fit_is_named():
    state = trained().state_dict()
    state = {"a": state.pop("0.weight"), "b": state.pop("1.bias"), **state}
    state["4.weight"], state["4.bias"] = torch.zeros(3, 9), torch.zeros(3, dtype=torch.int8)
    assert refusal(saved(state), f"{HERE}:tiny") == (
        "m.pt: does not fit test_load:tiny: 2 missing (0.weight, 1.bias), 2 "
        "unexpected (a, b), 2 of another kind (4.weight is 3x9, not 3x8, "
        "4.bias is 3 of int8, not 3); "
        "give the network it was trained as"
    )
    state = {f"x{n}": torch.zeros(1) for n in range(5)}
    assert refusal(saved(state), f"{HERE}:twins") == (
        "m.pt: does not fit test_load:twins: 3 missing (0.weight, 0.bias, "
        "1.bias), 5 unexpected (x0, x1, x2, ...); give the network it was "
        "trained as"
    )


def test_weights_alone_need_arch():
    path = saved(trained().state_dict())
    assert (
        refusal(path, error=ConfigError)
        == "m.pt: holds weights without their network; give --arch "
        "package.module:factory or one of demo, lenet"
    )
    assert (
        refusal(path, "lenett", ConfigError)
        == "--arch lenett is neither package.module:factory nor a built-in "
        "network; did you mean 'lenet'?"
    )


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        (
            "no.such:net",
            "no.such:net: no.such cannot be imported (ModuleNotFoundError: No "
            "module named 'no'); run from its folder or put that on PYTHONPATH",
        ),
        ("test_load:tinny", "test_load:tinny: test_load has no 'tinny'; did you mean 'tiny'?"),
        (
            "test_load:X",
            "test_load:X: fails when called without arguments (TypeError: "
            "'Tensor' object is not callable); run it on its own to see where",
        ),
        (
            "test_load:list",
            "--arch test_load:list made list, not a torch.nn.Module; name a "
            "function that returns the network",
        ),
    ],
)
def test_arch_that_is_no_network(arch, sentence, monkeypatch):
    monkeypatch.setattr(sys.modules[HERE], "list", list, raising=False)
    assert refusal(saved(trained().state_dict()), arch) == sentence


def test_nan_is_refused():
    net = trained()
    net[1].running_var[0] = torch.nan
    sentence = (
        "m.pt: 1.running_var holds NaN or infinity; give a network that was trained to its end"
    )
    assert refusal(saved(net.state_dict()), f"{HERE}:tiny") == sentence
    assert refusal(saved(net)) == sentence


@pytest.mark.parametrize(
    ("held", "what"),
    [
        ([1, 2], "a single list"),
        (torch.ones(1), "a single Tensor"),
        ({}, "an empty dictionary"),
        ({"epoch": 3, "weights\x1b": 1}, "epoch, weights\\x1b"),
        ({str(n): n for n in range(9)}, "0, 1, 2, 3, 4, 5, ..."),
    ],
)
def test_files_without_weights(held, what):
    assert (
        refusal(saved(held))
        == f"m.pt: holds {what}, neither a state dictionary nor a network; {WAY_OUT}"
    )


@pytest.mark.parametrize(
    "odd",
    [torch.ones(1).expand(10**6, 10**6), torch.eye(3).to_sparse(), torch.empty(3, device="meta")],
)
def test_tensors_that_are_no_plain_arrays(odd):
    assert (
        refusal(saved({"w": odd})) == "m.pt: w is no plain array (sparse, quantised or repeated in "
        "memory); give the float weights"
    )


# -- whole networks --------------------------------------------------------------------------------
def test_a_whole_network_of_torch_layers():
    net = trained()
    loads(saved(net), arch=None)
    loads(saved({"model": net, "epoch": 1}), arch=None)
    assert torch.equal(load_model("m.pt")(X), net.eval()(X))


def test_a_whole_network_may_fill_arch():
    loads(saved(trained()))


def test_shared_layers_and_weights_stay_shared():
    layer = nn.Linear(2, 2)
    net = load_model(saved(nn.Sequential(layer, nn.ReLU(), layer)))
    assert net[0] is net[2]
    net = load_model(saved(twins()))
    assert net[0].weight is net[1].weight


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.AdaptiveAvgPool2d((1, 1)), nn.Conv1d(2, 4, 3, padding="same", bias=False), nn.LayerNorm((2, 3)), nn.Embedding(3, 2),
     nn.Upsample(scale_factor=2.0), nn.ModuleDict({"a": nn.Hardswish()}), nn.PReLU(), nn.GroupNorm(2, 4), nn.ConvTranspose2d(1, 1, 2)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_layers_of_many_kinds(layer):
    back = load_model(saved(layer))
    assert type(back) is type(layer) and repr(back) == repr(layer) and equal(back, layer)


def test_a_pickle_becomes_records_before_any_layer_exists():
    loaded = read_torch(Path(saved(trained())).read_bytes(), "m.pt")
    assert isinstance(loaded, Record) and loaded.target is nn.Sequential
    assert [type(r).target for r in loaded.state["_modules"].values()] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Flatten,
        nn.Linear,
    ]


def test_the_allow_list_is_torch_layers_and_lent_only_while_reading():
    assert len(RECORDS) > 100
    for name, record in RECORDS.items():
        assert (
            name.startswith("torch.nn.modules.")
            and issubclass(record.target, nn.Module)
            and not issubclass(record, nn.Module)
        )
    before = Counter(
        torch.serialization.get_safe_globals()
    )  # a set underneath: its order is nobody's promise
    load_model(saved(trained()))
    assert Counter(torch.serialization.get_safe_globals()) == before


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Hostile:
    """Unpickled by an ordinary reader, this writes a file."""

    def __reduce__(self):
        return os.system, ("touch was_here",)


class Loader:
    """The same through a module of torch."""

    def __reduce__(self):
        return torch.hub.load_state_dict_from_url, ("https://example.org/x",)


def hooked() -> nn.Module:
    net = tiny()
    net[0].register_forward_hook(torch.Size)
    return net


def replaced(**attributes: object) -> nn.Module:
    net = tiny()
    net[0].__dict__.update(attributes)
    return net


def turning() -> nn.Module:
    net = nn.Sequential(nn.ReLU())
    net.append(net)
    return net


def tensor_with(**attributes: object) -> nn.Module:
    net = nn.Linear(1, 1)
    for name, value in attributes.items():
        setattr(net.weight, name, value)
    return net


REBUILD = (
    torch._utils._rebuild_tensor_v2
)  # one of the functions that a weights-only reader lets through


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (hooked, "its layer '0' holds the hook _forward_hooks"),
        (lambda: replaced(forward=REBUILD), "its layer '0' replaces its forward"),
        (lambda: replaced(forward=nn.ReLU()), "its layer '0' replaces its forward"),
        (lambda: replaced(eval=3), "its layer '0' replaces its eval"),
        (lambda: replaced(__class__=3), "its layer '0' replaces its __class__"),
        (
            lambda: replaced(stride=REBUILD),
            "its layer '0' has the attribute stride, which is no plain data",
        ),
        (
            lambda: replaced(stride=[{"a": (1, REBUILD)}]),
            "its layer '0' has the attribute stride, which is no plain data",
        ),
        (
            lambda: replaced(stride=nn.ReLU()),
            "its layer '0' has the attribute stride, which is no plain data",
        ),
        (lambda: replaced(_parameters=3), "its layer '0' has no table _parameters"),
        (
            lambda: replaced(_parameters={"weight": torch.ones(1)}),
            "its layer '0' has no table _parameters",
        ),
        (lambda: replaced(_modules={"a": 3}), "its layer '0' has no table _modules"),
        (
            lambda: replaced(_buffers={"a": torch.ones(1).expand(10**9)}),
            "its layer '0' has a tensor in _buffers that is no plain array",
        ),
        (
            lambda: tensor_with(note=REBUILD),
            "the network has a tensor in _parameters that is no plain array",
        ),
        (turning, "its layer '1' contains itself"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_networks_that_are_refused(net, why):
    assert refusal(saved(net())) == f"m.pt: is refused, for {why}; {WAY_OUT}"


class WeightWithHook(nn.Parameter):
    """Pickles as a weight that would call REBUILD in every backward pass."""

    def __reduce_ex__(self, protocol):
        return torch._utils._rebuild_parameter, (torch.ones(1, 1), True, OrderedDict({0: REBUILD}))


def test_a_hook_of_a_weight_is_refused():
    net = nn.Linear(1, 1)
    net.weight = WeightWithHook(torch.ones(1, 1))
    assert (
        refusal(saved(net)) == "m.pt: is refused, for the network has a tensor in _parameters that "
        f"is no plain array; {WAY_OUT}"
    )


def test_a_very_deep_network_is_refused():
    net, limit = nn.ReLU(), sys.getrecursionlimit()
    for _ in range(limit):
        net = nn.Sequential(net)
    sys.setrecursionlimit(20 * limit)  # only to write it
    try:
        path = saved(net)
    finally:
        sys.setrecursionlimit(limit)
    assert refusal(path) == f"m.pt: its layers are nested too deeply; {WAY_OUT}"


@pytest.mark.parametrize(
    ("held", "needed"),
    [
        (lambda: {"a": Hostile()}, f"{os.system.__module__}.system"),
        (
            lambda: {"state_dict": tiny().state_dict(), "args": Hostile()},
            f"{os.system.__module__}.system",
        ),
        (lambda: replaced(hook=Hostile()), f"{os.system.__module__}.system"),
    ],
)
@pytest.mark.parametrize("new_format", [True, False])
def test_files_that_would_run_programs(held, needed, new_format):
    path = saved(held(), _use_new_zipfile_serialization=new_format)
    assert (
        refusal(path, f"{HERE}:tiny")
        == f"m.pt: is refused, for it needs {needed}, beyond weights and torch.nn layers; {WAY_OUT}"
    )
    assert not Path("was_here").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_functions_in_a_file_stay_names(new_format):
    path = saved(
        {"model": trained().state_dict(), "a": Loader(), "b": [abs, Own], "c": Namespace(lr=1)},
        _use_new_zipfile_serialization=new_format,
    )
    loads(path)
    assert (
        refusal(saved([abs, all]))
        == f"m.pt: holds a single list, neither a state dictionary nor a network; {WAY_OUT}"
    )


def test_a_network_with_layers_of_its_own_gives_its_weights():
    net = nn.Sequential(trained(), Own())
    told = (
        "m.pt: holds a network with layers of its own (test_load.Own); give "
        "--arch package.module:factory, and its weights are taken from the "
        "file"
    )
    assert refusal(saved(net), error=ConfigError) == told
    loads("m.pt")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_ordinary_pickles_never_run(protocol):
    Path("m.pt").write_bytes(pickle.dumps(Hostile(), protocol))
    assert (
        refusal("m.pt") == f"m.pt: is refused, for it needs {os.system.__module__}.system, "
        f"beyond weights and torch.nn layers; {WAY_OUT}"
    )
    assert not Path("was_here").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_ordinary_pickles_of_weights(protocol):
    Path("m.pkl").write_bytes(pickle.dumps({"model": trained().state_dict()}, protocol))
    loads("m.pkl")


def test_old_whole_networks():
    loads(saved(trained(), _use_new_zipfile_serialization=False), arch=None)


# -- files of other kinds --------------------------------------------------------------------------
def test_files_that_are_not_there():
    write_atomic("lenet.pt", b"x")
    assert refusal("lennet.pt") == "lennet.pt: no such file; did you mean 'lenet.pt'?"
    Path("folder.pt").mkdir()
    assert refusal("folder.pt") == "folder.pt: is a folder, not a file; give a file"
    Path("empty.pt").touch()
    assert refusal("empty.pt") == "empty.pt: is empty (0 bytes); make or fetch it again"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("m.onnx", f"ONNX models are not read by this version; {WAY_OUT}"),
        ("m.pt2", f"exported programs are not read by this version; {WAY_OUT}"),
        (
            "m.rq",
            "is compressed already, by rqtool; use it with rqtool eval, train or "
            "export, or give the float model",
        ),
        (
            "m.h5",
            "is no kind of model this version reads; give a file ending in .pt, "
            ".pth, .th, .safetensors",
        ),
        ("m.pt", "is not a readable torch file; make or fetch it again"),
    ],
)
def test_other_kinds_of_files(name, sentence):
    Path(name).write_bytes(b"hello world")
    assert refusal(name) == f"{name}: {sentence}"


def test_garbage_named_safetensors():
    Path("m.safetensors").write_bytes(b"hello")
    assert (
        refusal("m.safetensors")
        == "m.safetensors: is not a readable safetensors file; make or fetch it again"
    )


FROM_ARCHIVE = "give --arch package.module:factory, and its weights are taken from the file"


@pytest.mark.filterwarnings("ignore")  # torch calls TorchScript deprecated
def test_archives_of_code_give_their_weights():
    torch.jit.script(trained().eval()).save("m.pt")
    assert (
        refusal("m.pt")
        == f"m.pt: is a TorchScript archive, which is code, not weights; {FROM_ARCHIVE}"
    )
    loads("m.pt")
    program = torch.export.export(trained().eval(), (torch.ones(1, 1, 4, 4),))
    torch.export.save(program, "m.pt2")
    loads("m.pt2")
    os.replace("m.pt2", "m.pt")
    assert (
        refusal("m.pt") == f"m.pt: exported programs are not read by this version; {FROM_ARCHIVE}"
    )
    loads("m.pt")


def test_truncated_files_are_refused():
    whole = Path(saved(trained().state_dict())).read_bytes()
    for length in (3, 50, len(whole) // 2, len(whole) - 1):
        Path("m.pt").write_bytes(whole[:length])
        assert refusal("m.pt", "lenet") in (
            "m.pt: is a damaged torch file; make or fetch it " "again", "m.pt: is not a readable " "torch file; make or fetch " "it again"
        )  # fmt: skip


@settings(max_examples=200)
@given(st.data())
@pytest.mark.parametrize("kind", ["zip", "old", "network", "safetensors"])
def test_damage_is_refused_or_harmless(tmp_path_factory, kind, data):
    path = (
        tmp_path_factory.getbasetemp()
        / f"damaged.{'safetensors' if kind == 'safetensors' else 'pt'}"
    )
    changed = bytearray(WHOLE[kind])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(changed) - 1), st.integers(0, 255)), max_size=4)
    ):
        changed[place] = value
    path.write_bytes(
        changed[: data.draw(st.integers(1, len(changed)))] if data.draw(st.booleans()) else changed
    )
    try:
        net = load_model(path, None if kind == "network" else f"{HERE}:tiny")
    except (
        InputError,
        ConfigError,
    ) as e:  # ConfigError: what was a network may have become weights
        assert str(e).startswith(str(path)) and str(e).isprintable()
    else:
        assert isinstance(net, nn.Module)


def _whole() -> dict[str, bytes]:
    files = {"zip": io.BytesIO(), "old": io.BytesIO(), "network": io.BytesIO()}
    torch.save(trained().state_dict(), files["zip"])
    torch.save(trained().state_dict(), files["old"], _use_new_zipfile_serialization=False)
    torch.save(trained(), files["network"])
    return {
        **{k: f.getvalue() for k, f in files.items()},
        "safetensors": safetensors.torch.save(trained().state_dict()),
    }


WHOLE = _whole()


# -- built-in networks and real files --------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(ZOO))
def test_built_in_networks(name):
    entry = ZOO[name]
    net = load_model(saved(entry().state_dict()), name)
    assert net(torch.zeros(2, *entry.shape)).shape == (2, 10)


def test_the_demonstration_network():
    net, test = load_model("demo"), load_data("demo").test
    with torch.no_grad():
        right = (net(torch.from_numpy(test.x).float() / 255).argmax(1).numpy() == test.y).sum()
    assert (
        right > 910
    )  # 921 where it was trained; another processor may round a few images the other way


REFERENCE = """
import sys
from rqtool.model.load import load_model
for path, arch in zip(sys.argv[1::2], sys.argv[2::2]):
    net = load_model(path, f"reference_models:{arch}")
    print(type(net).__name__, sum(p.numel() for p in net.parameters()))
"""


def test_real_checkpoints(shared_model):
    files = {
        "lenetbn_mnist.pt": "lenet_bn",
        "resnet20-12fca82f.th": "resnet20",
        "resnet20_cifar10jpeg_finetuned.pt": "resnet20",
    }
    arguments = [str(a) for name, arch in files.items() for a in (shared_model(name), arch)]
    folder = shared_model("reference_models.py").parent
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-B", "-c", REFERENCE, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == "Sequential 35610\nResNet 269722\nResNet 269722\n", done.stderr

"""Readers of data that anybody can write: whatever it is, our error or the right answer."""

import json
import shutil

import pytest
import timm
import torch
from helpers import ROOT, narrow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import timm_attn
from timm_attn.load import load_model
from timm_attn.models import MECHANISMS
from timm_attn.weights import WeightsError, read_config, read_folder, read_index, schema
from timm_attn.weights.config import check_weights

NAME = "resnet20_asr.cpu_c10"
SHIPPED = ROOT / "hub"
RESULTS = shutil.ignore_patterns("results")  # of runs, which nothing here reads
INDEX = json.loads((SHIPPED / "index.json").read_text())
# Of all that ship, two forms of one network: the others have the same places.
INDEX["checkpoints"] = {name: INDEX["checkpoints"][name] for name in (NAME, "resnet20.asr_cpu_c10_folded")}
CONFIG = json.loads((SHIPPED / NAME / "config.json").read_text())
WEIGHTS = (SHIPPED / NAME / "model.safetensors").read_bytes()
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(
        ["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "", "\x00", "x" * 500, 10**400, "\ud800"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def places(value, path=()):
    """Paths of all values inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, element in items:
        yield from places(element, (*path, key))


def changed(value, path, new, drop):
    """A copy of a JSON value with another value, or none, in one place."""
    value = json.loads(json.dumps(value))
    if not path:
        return new
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if drop:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return value


def write_json(path, value):
    path.write_text(json.dumps(value))


INDEX_PLACES, CONFIG_PLACES = list(places(INDEX)), list(places(CONFIG))


@FUZZ
@given(st.sampled_from(INDEX_PLACES), values, st.booleans())
def test_any_index(tmp_path_factory, place, new, drop):
    folder = tmp_path_factory.mktemp("hub")
    write_json(folder / "index.json", changed(INDEX, place, new, drop))
    try:
        checkpoints = read_index(folder)
    except WeightsError:
        return
    for checkpoint in checkpoints:
        assert checkpoint.folder.parent == folder
        for name in checkpoint.files:
            assert (checkpoint.folder / name).resolve().is_relative_to(checkpoint.folder.resolve())


@FUZZ
@given(st.sampled_from(CONFIG_PLACES), values, st.booleans())
def test_any_config(tmp_path_factory, place, new, drop):
    path = tmp_path_factory.mktemp("config") / "config.json"
    write_json(path, changed(CONFIG, place, new, drop))
    try:
        config = read_config(path)
    except WeightsError:
        return
    assert config["pretrained_cfg"].get("input_size", [3, 1, 1])[1] <= 4096
    assert not schema.FORBIDDEN & set(config.get("model_args", {}))


@FUZZ
@given(
    st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("index.json", "config.json", "model.safetensors"):
        (folder / name).write_bytes(content)
    for read in (
        read_index,
        lambda f: read_config(f / "config.json"),
        lambda f: check_weights(f / "model.safetensors"),
    ):
        with pytest.raises(WeightsError):
            read(folder)


@settings(FUZZ, max_examples=20)  # each is one comparison of a digest, whatever is damaged
@given(st.integers(0, len(WEIGHTS) - 1), st.integers(1, 255), st.booleans())
def test_damaged_weights_are_refused_by_the_index(hub, position, mask, cut):
    path = hub / NAME / "model.safetensors"
    content = bytearray(WEIGHTS)
    content[position] ^= mask
    path.write_bytes(content[:position] if cut else content)
    with pytest.raises(WeightsError, match="is damaged"):
        read_folder(hub / NAME)


@FUZZ
@given(st.integers(0, 12_000), st.integers(1, 255), st.booleans())
def test_damaged_weights_without_an_index_give_our_error_or_a_tensor_each(
    tmp_path_factory, position, mask, cut
):
    """Without a hash, what is wrong in the header must still not end inside of a library."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    content = bytearray(WEIGHTS)
    content[position] ^= mask
    path.write_bytes(content[:position] if cut else content)
    try:
        check_weights(path)
    except WeightsError:
        return
    assert load_file(path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return shutil.copytree(SHIPPED, tmp_path_factory.mktemp("shipped") / "hub", ignore=RESULTS)


def folder_with(tmp_path, **fields):
    folder = shutil.copytree(SHIPPED / NAME, tmp_path / "m")
    write_json(folder / "config.json", {**CONFIG, **fields})
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "nothing_of_the_kind"}, "'nothing_of_the_kind', which nobody has registered"),
        ({"architecture": "../resnet20"}, "architecture is '../resnet20'"),
        ({"num_classes": 10**9}, "num_classes is 1000000000: it must be a whole number from 0 to 1000000"),
        ({"num_classes": 9}, "names 10 labels for 9 classes"),
        ({"model_args": {"layers": [10**6] * 3}}, r"model_args.layers\[0\] is 1000000"),
        ({"model_args": {"channels": [10**7]}}, r"model_args.channels\[0\] is 10000000"),
        ({"model_args": {"block": "os.system"}}, "model_args.block is 'os.system': it must be a word"),
        (
            {"model_args": {"pretrained_cfg_overlay": {}}},
            "model_args.pretrained_cfg_overlay must be left out",
        ),
        (
            {"pretrained_cfg": {"file": "/etc/passwd"}},
            "pretrained_cfg.file is '/etc/passwd': it must be left out",
        ),
        ({"pretrained_cfg": {"custom_load": True}}, "custom_load is True"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, r"input_size\[1\] is 1000000"),
    ],
)
def test_a_config_that_asks_for_too_much(fields, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        load_model(str(folder_with(tmp_path, **fields)))


@pytest.mark.parametrize("architecture", ["resnet10t", "resnet10t_dia", "test_convnext_se"])
def test_a_network_far_larger_than_its_weights(architecture, tmp_path):
    """Whether its name is known before it is read or not."""
    big = {"dims": [20_000] * 4} if "convnext" in architecture else {"channels": [20_000] * 4}
    fields = {"architecture": architecture, "num_classes": 10, "model_args": big}
    folder = folder_with(tmp_path, **fields)
    for read in (load_model, lambda name: timm_attn.graft("resnet18_asr", f"local-dir:{name}")):
        with pytest.raises(WeightsError, match="far fewer than .*: these are not its weights"):
            read(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_a_folder_are_not_followed(name, tmp_path):
    folder = shutil.copytree(SHIPPED / NAME, tmp_path / "m")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(WeightsError, match="is a link out of"):
        load_model(str(folder))


def test_a_checkpoint_folder_that_is_a_link_out_of_its_hub(tmp_path):
    hub = shutil.copytree(SHIPPED, tmp_path / "hub", ignore=RESULTS)
    (hub / NAME).rename(tmp_path / "elsewhere")
    (hub / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="is a link out of"):
        read_index(hub)


def test_json_that_would_exhaust_a_reader(tmp_path):
    path = tmp_path / "config.json"
    for content in ("[" * 100_000, '{"num_classes": ' + "9" * 10_000 + "}", '{"num_classes": NaN}'):
        path.write_text(content)
        with pytest.raises(WeightsError, match="cannot be read|is no number"):
            read_config(path)


def test_the_schema_knows_every_option_of_every_mechanism():
    for key, mechanism in MECHANISMS.items():
        schema.model_args(json.loads(json.dumps(mechanism.options)), key)


def test_values_of_the_wrong_kind_are_not_confused():
    for check, good, bad in (
        (schema.whole(0, 3), 1, [True, 1.0, "1", None, 4, -1]),
        (schema.number(0, 3), 1.5, [True, "1", None, float("nan"), float("inf")]),
        (schema.FLAG, True, [1, 0, "true", None]),
        (
            schema.FILE,
            ".eval_results/x.yaml",
            ["../x", "a/b", ".x", "x/../y", "", "a\n", ".eval_results/../x"],
        ),
        (schema.REPO, "a/b", ["a", "../b", "a/b/c", "a/..", "/a"]),
    ):
        check(good, "value")
        for value in bad:
            with pytest.raises(WeightsError, match="^value is"):
                check(value, "value")


def test_wrong_shapes_are_named(tmp_path):
    from safetensors.torch import save_file

    state = narrow("resnet20_asr").state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 10}
    with pytest.raises(RuntimeError, match=r"layer1.0.conv1.weight"):
        timm.create_model(
            "resnet20_asr",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            channels=[8, 16, 24],
            layers=[2, 1, 2],
        )

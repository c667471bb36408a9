import copy
from pathlib import Path

import pytest
import torch
import yaml
from onnx_files import write_recogniser

from lrface import config
from lrface.config import parse_recipe, to_plain, to_yaml
from lrface.errors import UsageError
from lrface.recipes import build_method, load_recipe, shipped_recipes, stage_settings

MINIMAL = {
    "name": "small",
    "data": {"path": "faces", "batch_size": 8},
    "stages": [
        {"name": "first", "method": "qualnet", "steps": 10},
        {
            "name": "second",
            "method": {"name": "qualnet", "freeze": ["decoder"]},
            "load": ["encoder", "decoder"],
            "epochs": 2,
        },
    ],
}


def parse(*overrides: str, **changes: object) -> config.Recipe:
    return parse_recipe({**copy.deepcopy(MINIMAL), **changes}, overrides)


def refused(message: str, *overrides: str, **changes: object) -> None:
    with pytest.raises(UsageError, match=message):
        parse(*overrides, **changes)


def test_defaults_are_those_of_the_paper():
    recipe = parse()
    assert recipe.head == config.Named("cosface") and recipe.backbone == config.Named("ir50")
    assert recipe.stages[0].degrade == config.Degrade(0.5, [56, 28, 14], None, ["nearest"], ["bilinear"], 0.5)
    assert recipe.stages[1].method == config.Named("qualnet", {"freeze": ["decoder"]})
    assert recipe.stages[1].epochs == 2.0 and isinstance(recipe.stages[1].epochs, float)


def test_unknown_keys_name_the_nearest_at_every_depth():
    refused(r"unknown key stage \(did you mean 'stages'\?\)", stage=1)
    refused(r"unknown key data.batchsize \(did you mean 'batch_size'\?\)", "data.batchsize=3")
    refused(r"unknown key data.synthetic.identites \(did you mean 'identities'", "data.synthetic.identites=3")
    refused(r"unknown key stages.1.methd \(did you mean 'method'\?\)", "stages.1.methd=classify")
    refused(
        r"unknown key stages.0.optimiser.learningrate \(did you mean 'learning_rate'",
        "stages.0.optimiser.learningrate=1",
    )
    refused(r"unknown key stages.0.degrade.size \(did you mean 'sizes'\?\)", "stages.0.degrade.size=[14]")
    refused(r"unknown key trainer.devise \(did you mean 'device'\?\)", "trainer.devise=cpu")
    refused(r"unknown key zzzzzz; known: name, stages", zzzzzz=1)


def test_unknown_arguments_name_the_nearest():
    cases = {
        "backbone.widht=8": r"backbone.widht for backbone 'ir50' \(did you mean 'width'\?\)",
        "head.margn=0.5": r"head.margn for head 'cosface' \(did you mean 'margin'\?\)",
        "decoder.block=2": r"decoder.block for decoder 'subpixel' \(did you mean 'blocks'\?\)",
        "stages.0.method.quality_wieght=2": r"stage 'first': unknown key method.quality_wieght .*'quality_weight'",
        "stages.0.method=qualnett": r"stage 'first': unknown method 'qualnett' \(did you mean 'qualnet'\?\)",
    }
    for override, message in cases.items():
        recipe = parse(override)
        with torch.device("meta"), pytest.raises(UsageError, match=message):
            build_method(recipe, recipe.stages[0], 10)


@pytest.mark.parametrize(
    "override", ["head.identities=5", "decoder.in_channels=3", "stages.0.method.encoder=x"]
)
def test_what_follows_from_the_data_cannot_be_given(override):
    recipe = parse(override)
    with torch.device("meta"), pytest.raises(UsageError, match="follows from the rest of the recipe"):
        build_method(recipe, recipe.stages[0], 10)


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed=one", "seed must be of type int; found 'one'"),
        ("seed=true", "seed must be of type int; found True"),
        ("seed=1.5", "seed must be of type int; found 1.5"),
        ("data.batch_size=big", "data.batch_size must be of type int; found 'big'"),
        ("data.synthetic=many", "data.synthetic must be a mapping; found 'many'"),
        (
            "stages.1.optimiser.learning_rate=fast",
            "stages.1.optimiser.learning_rate must be of type float; found 'fast'",
        ),
        ("stages.0.degrade.sizes=14", "stages.0.degrade.sizes must be a list; found 14"),
        ("stages.0.degrade.sizes=[14, large]", "stages.0.degrade.sizes.1 must be of type int; found 'large'"),
        ("stages.0.optimiser.nesterov=1", "stages.0.optimiser.nesterov must be of type bool; found 1"),
        ("backbone=3", "backbone must be a name, or a mapping with a name"),
        ("stages.0.method={freeze: [decoder]}", "stages.0.method must be a name, or a mapping with a name"),
        ("head={name: 3}", "head must be a name, or a mapping with a name"),
        ("stages=none", "stages must be a list; found 'none'"),
        ("trainer=fast", "trainer must be a mapping; found 'fast'"),
        ("name=null", "name must be of type str; found None"),
    ],
)
def test_wrong_types_name_the_dotted_path(override, message):
    refused(message, override)


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages=[]", "stages must list at least one stage"),
        ("stages.0.steps=null", "stages.0: give exactly one of steps and epochs"),
        ("stages.0.epochs=1", "stages.0: give exactly one of steps and epochs"),
        ("stages.0.steps=0", "stages.0: steps or epochs must be above 0"),
        ("stages.1.epochs=-1", "stages.1: steps or epochs must be above 0"),
        ("stages.1.epochs=.nan", "stages.1: steps or epochs must be above 0"),
        ("stages.1.epochs=.inf", "stages.1: steps or epochs must be above 0"),
        ("stages.1.name=first", "stages.0.name must be unique"),
        ("stages.1.name=a/b", "stages.1.name must be unique and without '/'"),
        ("stages.0.load=[encoder]", "stages.0.load: the first stage has none before it; use start_from"),
        ("stages.1.load=[3]", "stages.1.load.0 must be of type"),
        ("data.path=null", "data: give exactly one of path and synthetic"),
        ("data.synthetic={}", "data: give exactly one of path and synthetic"),
        ("data.batch_size=1", "data.batch_size must be at least 2"),
        ("data.workers=-1", "data.workers must be at least 0; found -1"),
    ],
)
def test_values_that_make_no_sense(override, message):
    refused(message, override)


def test_missing_fields_are_named():
    with pytest.raises(UsageError, match="^name is missing"):
        parse_recipe({"stages": []})
    with pytest.raises(UsageError, match="^stages.0.method is missing"):
        parse_recipe({"name": "x", "stages": [{"name": "a"}]})
    with pytest.raises(UsageError, match="a recipe is a mapping of fields; found list"):
        parse_recipe([])


def test_overrides_by_index_and_by_name():
    recipe = parse(
        "seed=7",
        "stages.0.steps=3",
        "stages.second.epochs=0.5",
        "stages.second.optimiser.learning_rate=1e-3",
        "stages.second.degrade.sizes=[28, 14]",
        "backbone.width=8",
        "head=arcface",
        "head.margin=0.4",
        "stages.0.method.quality_weight=0.5",
        "out=runs/a=b",
    )
    assert recipe.seed == 7 and recipe.stages[0].steps == 3 and recipe.stages[1].epochs == 0.5
    assert recipe.stages[1].optimiser.learning_rate == 0.001
    assert recipe.stages[0].optimiser.learning_rate == 0.1
    assert recipe.stages[1].degrade.sizes == [28, 14]
    assert recipe.head == config.Named("arcface", {"margin": 0.4})
    assert recipe.stages[0].method == config.Named("qualnet", {"quality_weight": 0.5})
    assert recipe.out == "runs/a=b"


def test_an_override_of_a_part_that_the_recipe_leaves_out():
    recipe = parse(
        "trainer.device=cpu", "decoder={name: subpixel, width: 64}", "decoder.blocks=2", "head.margin=0.1"
    )
    assert recipe.trainer.device == "cpu"
    assert recipe.head == config.Named("cosface", {"margin": 0.1})
    assert parse("decoder={width: 64}").decoder == config.Named("subpixel", {"width": 64})
    assert recipe.decoder == config.Named("subpixel", {"width": 64, "blocks": 2})


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed", "an override is key=value, such as data.batch_size=64; found 'seed'"),
        ("=3", "an override is key=value"),
        ("data..path=3", "an override is key=value"),
        ("seed=[1", "the value of override 'seed=.1' is no YAML"),
        ("stages.2.steps=3", "no item '2'; items 0 to 1, named first, second"),
        ("stages.third.steps=3", "no item 'third'; items 0 to 1, named first, second"),
        ("data.batch_size.x=3", "data.batch_size is a value and has no 'x'"),
    ],
)
def test_overrides_that_fit_nowhere(override, message):
    refused(message, override)


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(UsageError, match="(?s)broken.yaml is no valid YAML: .*line 1"):
        config.read_yaml(path)
    path.write_bytes(b"name: \xff")
    with pytest.raises(UsageError, match="broken.yaml is no valid YAML"):
        config.read_yaml(path)
    with pytest.raises(UsageError, match="missing.yaml cannot be read: No such file"):
        config.read_yaml(tmp_path / "missing.yaml")
    path.write_text("!!python/object/apply:os.system ['touch /tmp/never']")
    with pytest.raises(UsageError, match="broken.yaml is no valid YAML"):
        config.read_yaml(path)


def test_yaml_round_trip():
    recipe = parse(
        "head={name: arcface, margin: 0.35}",
        "stages.0.optimiser.learning_rate=1e-5",
        "stages.0.optimiser.clip_norm=5",
        "stages.1.degrade.continuous=[8, 112]",
        "data.cache=true",
        "trainer.compile=auto",
        "description='Zoë: a test'",
    )
    text = to_yaml(recipe)
    again = parse_recipe(yaml.safe_load(text))
    assert again == recipe and to_yaml(again) == text
    assert "clip_norm: 5.0" in text and "Zoë" in text


def test_differences_name_dotted_keys():
    old = to_plain(parse())
    new = to_plain(
        parse("seed=3", "stages.1.optimiser.learning_rate=0.5", "head.margin=0.1", "stages.0.steps=11")
    )
    assert config.differences(old, old) == []
    assert set(config.differences(old, new)) == {
        "seed: 0 -> 3",
        "stages.1.optimiser.learning_rate: 0.1 -> 0.5",
        "head.margin: None -> 0.1",
        "stages.0.steps: 10 -> 11",
    }
    assert config.differences({"a": [1]}, {"a": [1, 2]}) == ["a: [1] -> [1, 2]"]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_builds(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.description, "a recipe says what it is"
    if recipe.backbone.name == "open_clip":
        pytest.importorskip("open_clip", reason="pip install 'lrface[clip]'")
    if recipe.backbone.name == "onnx":
        pytest.importorskip("onnx2torch", reason="pip install 'lrface[onnx]'")
        recipe.backbone.arguments["path"] = str(write_recogniser(tmp_path / "recogniser.onnx"))
    for stage in recipe.stages:  # a teacher that the user names
        teacher = stage.method.arguments.get("teacher")
        if isinstance(teacher, dict) and teacher.get("name") == "onnx" and "path" not in teacher:
            teacher["path"] = str(write_recogniser(tmp_path / "teacher.onnx", size=112, width=128))
    assert parse_recipe(yaml.safe_load(to_yaml(recipe))) == recipe
    for index, stage in enumerate(recipe.stages):
        stage_settings(stage)
        with torch.device("meta"):
            method = build_method(recipe, stage, identities=10)
        assert all(value.device.type == "meta" for value in method.parameters())
        assert sum(len(group["params"]) for group in method.param_groups()) > 0
        for part in stage.load:
            method.get_submodule(part if isinstance(part, str) else part["to"])
        if index == 0:
            assert stage.load == []


def test_recipes_in_all_folders_are_found():
    root = Path(__file__).resolve().parents[1] / "configs"
    files = {path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.y*ml")}
    assert files == set(shipped_recipes())
    assert {"celeba300/naive", "celeba300/qualnet_lm", "casia/qualnet_lm_r50"} <= files


@pytest.mark.parametrize("name", ["casia/qualnet_lm_r50", "casia/naive_r50", "casia/specialised_r50"])
def test_the_recipes_of_the_paper_have_its_schedule(name):
    recipe = load_recipe(name)
    assert recipe.data.batch_size == 256
    assert recipe.head.name == "cosface"
    assert (recipe.head.arguments.get("scale", 30.0), recipe.head.arguments.get("margin", 0.25)) == (30, 0.25)
    for stage in recipe.stages:
        assert stage.steps == 47_000
        optimiser, schedule = stage_settings(stage)
        rates = [
            optimiser.learning_rate * schedule.factor(step, stage.steps)
            for step in (0, 17_999, 18_000, 28_000, 36_000, 43_999, 44_000, 46_999)
        ]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_stage_two_of_the_paper():
    recipe = load_recipe("casia/qualnet_lm_r50")
    first, second = recipe.stages
    assert first.degrade.clean_share == 1.0 and first.load == []
    assert set(second.load) >= {"encoder", "decoder"}
    assert set(second.method.arguments["freeze"]) == {"decoder", "batchnorm"}
    assert second.method.arguments.get("quality_weight", 1.0) == 1.0
    assert second.method.arguments.get("clip", True) is True
    assert second.degrade == config.Degrade(
        0.5, [56, 28, 14], None, ["nearest"], ["bilinear"], second.degrade.mirror
    )

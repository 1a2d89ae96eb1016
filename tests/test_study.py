"""Any study file is read, or rejected in one line that names the field."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.cli import run_study
from engine.core.errors import StudyError
from engine.plan import plan
from engine.profile import Profile
from engine.study import Study, apply_sets, load_profile, load_study, validate

CONFIGS = Path(__file__).parents[1] / "configs"
DIGITS = (CONFIGS / "digits.yaml").read_text("utf-8")
VALUES = yaml.safe_load(DIGITS)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "study.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refusal(path: Path, *sets: str) -> str:
    with pytest.raises(StudyError) as caught:
        plan(load_study(path, sets))
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    text.encode()  # it can be printed
    assert len(text) < 1000
    return text


# Valid studies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "profiles").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_example_profile_is_read(path: Path) -> None:
    assert load_profile(path).stage("generate").batch_size >= 1


def test_equivalent_yaml_has_the_same_keys(write: Write) -> None:
    other = json.dumps(dict(reversed(VALUES.items())) | {"reader": "digits"}, indent=1)
    keys = [step.key for step in plan(load_study(write(other)))]
    assert keys == [step.key for step in plan(load_study(CONFIGS / "digits.yaml"))]


# base: and --set --------------------------------------------------------------------------------


def test_study_overrides_its_base(write: Write) -> None:
    write(DIGITS, "below.yaml")
    write("base: below.yaml\nseed: 1\nsplit: {val: 0.2}\n", "middle.yaml")
    study = load_study(write("base: middle.yaml\nname: child\nseed: 2\n"), ["seed=3"])
    assert (study.name, study.seed, study.split.val, study.split.test) == ("child", 3, 0.2, 0.25)
    assert study.generators == load_study(CONFIGS / "digits.yaml").generators


def test_another_plugin_takes_no_fields_from_the_base(write: Write) -> None:
    write(DIGITS, "below.yaml")
    study = load_study(write("base: below.yaml\ngenerators: {ddpm: {name: traditional}}\n"))
    assert study.generators["ddpm"].name == "traditional"  # type: ignore[attr-defined]
    same = load_study(write("base: below.yaml\ngenerators: {ddpm: {train_steps: 9}}\n"))
    assert same.generators["ddpm"].train_steps == 9  # type: ignore[attr-defined]
    assert same.generators["ddpm"].guidance_scale == 1.5  # type: ignore[attr-defined]


def test_setting_is_read_as_yaml() -> None:
    assert apply_sets({"a": {"b": 1, "c": 2}}, ["a.b=[1, x]", "d.e=2", "g=a=b"]) == {
        "a": {"b": [1, "x"], "c": 2}, "d": {"e": 2}, "g": "a=b"
    }  # fmt: skip


def test_null_removes_a_field_of_the_base(write: Write) -> None:
    write(DIGITS, "below.yaml")
    path = write("base: below.yaml\nrequest: {per_class: null, ratio: 2}\n")
    assert load_study(path).request.ratio == 2
    assert load_study(path, ["generators=null"]).generators == {}
    assert "name: is missing" in refusal(path, "name=null")
    assert "3" not in load_study(path, ["split.train_limit.3=null"]).split.train_limit


def test_circular_bases_are_rejected(write: Write) -> None:
    write("base: b.yaml\n", "a.yaml")
    write("base: study.yaml\n", "b.yaml")
    assert "base: the files form a circle" in refusal(write("base: a.yaml\n"))
    assert "base: the files form a circle" in refusal(write("base: study.yaml\n"))


@pytest.mark.parametrize(
    ("base", "text"),
    [
        ("no.yaml", "no.yaml: no such file"),
        (".", "cannot be read"),
        ('"a\\0b"', "base: must be the path of a file"),
        ('"a\\nb"', "base: must be the path of a file"),
        ("[a.yaml]", "base: must be the path of a file"),
        ("x" * 300, "cannot be read"),
    ],
)
def test_unreadable_base_is_named(write: Write, base: str, text: str) -> None:
    assert text in refusal(write(f"base: {base}\n"))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("seed", "write it as field.subfield=value"),
        ("=1", "write it as field.subfield=value"),
        ("split..val=1", "write it as field.subfield=value"),
        ("a\nb", "--set a b: write it"),
        ("seed=[1", "--set seed=[1: not valid YAML"),
        ("seed=2020-99-99", "--set seed=2020-99-99: not valid YAML: month"),
        ("seed=!!bool x", "--set seed=!!bool x: not valid YAML"),
        ("seed=!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("sede=1", "sede: no such field"),
        ("split.vall=1", "split.vall: no such field"),
        ("generators.ddpm.foo=1", "generators.ddpm.foo: no such field"),
        ("split=&a {b: *a}", "split.b: no such field"),
    ],
)
def test_invalid_setting_is_named(write: Write, setting: str, text: str) -> None:
    assert text in refusal(write(DIGITS), setting)


# Invalid studies --------------------------------------------------------------------------------

BOMB = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    + [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping of fields"),
        ("- a\n", "must be a mapping of fields"),
        ("name: x", "reader: is missing (and 1 more)"),
        ("\tname: x", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: 2020-99-99", "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ('a: "\\ud800"', "not valid YAML"),
        ("&a [*a]", "must be a mapping of fields"),
        ("1: 2", "1: no such field"),
        ("name: *nothing", "not valid YAML"),
        ("name: a\nname: b", "'name' appears twice"),
        (BOMB, "a: no such field"),
    ],
    ids=range(19),
)
def test_file_that_is_not_a_study_is_rejected(write: Write, text: str, message: str) -> None:
    assert message in refusal(write(text))


def test_exponential_values_are_rejected_in_a_short_line(write: Write) -> None:
    fields = ["licence", "reader", "preprocess", "split", "audit", "embedder", "cluster", "name"]
    text = f"notes: &a [{', '.join('x' * 10)}]"
    for field, before, anchor in zip(fields, "abcdefgh", "bcdefghi", strict=True):
        text += f"\n{field}: &{anchor} [{', '.join([f'*{before}'] * 10)}]"
    assert "name: must be a valid string, is [[[" in refusal(write(text))


def test_study_that_contains_itself_is_rejected(write: Write) -> None:
    write("x: &a {y: *a}\n", "below.yaml")
    assert "nested too deeply" in refusal(write("base: below.yaml\nx: &a {y: *a}\n"))


def test_binary_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "cannot be read" in refusal(tmp_path / "study.yaml")
    assert "no such file" in refusal(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("setting", "field", "reason"),
    [
        ("nmae=x", "nmae", "no such field"),
        ("name=../x", "name", "must match pattern"),
        ("name=[x]", "name", "must be a valid string, is ['x']"),
        ("search.ratios=[]", "search.ratios", "must have at least 1 item, not 0, is []"),
        ("seed=-1", "seed", "must be greater than or equal to 0, is -1"),
        ("seed=4294967296", "seed", "must be less than 4294967296"),
        (f"seed=0x{'F' * 5000}", "seed", "must be less than 4294967296, is a number of thousands"),
        (f"training.evaluate_every=0x{'F' * 5000}", "training.evaluate_every", "below 2**63"),
        ("reader=nope", "reader", "no reader named 'nope'; choose from csv, dicom, digits"),
        ("reader={name: imagefolder}", "reader.root", "is missing"),
        ("embedder=cnn", "embedder.model", "is missing; for example microsoft/resnet-50"),
        (
            "reader={name: csv, root: a, file: b, delimiter: xx}",
            "reader.delimiter",
            "must match pattern",
        ),
        ("reader=[digits]", "reader", "must name its plugin"),
        ("reader={name: csv, root: a, file: b, multi: {x: '|'}}", "reader", "multi names x"),
        ("task=colour", "task", "the data has no task 'colour'; it has class"),
        ("preprocess.size=1e12", "preprocess.size", "must be "),
        ("preprocess.size=7", "preprocess.size", "must be greater than or equal to 8, is 7"),
        ("preprocess.codec=bmp", "preprocess.codec", "must be 'png', 'jpeg' or 'webp', is 'bmp'"),
        ("split.val=.nan", "split.val", "must be a finite number, is nan"),
        ("split.val=0", "split.val", "must be greater than 0, is 0"),
        ("split.val=0.7", "split", "val + test must leave at least a tenth for train"),
        ("split.train_limit={a: 1}", "split.train_limit.a", "must be greater than or equal to 2"),
        (
            "split.train_limit={3: 1}",
            "split.train_limit.3",
            "must be greater than or equal to 2, is 1",
        ),
        ("audit.on_leak=ignore", "audit.on_leak", "must be 'fail', 'drop' or 'move'"),
        ("audit.embedder=nope", "audit.embedder", "no embedder named 'nope'"),
        ("audit.decode_timeout=.inf", "audit.decode_timeout", "must be "),
        ("request.ratio=-1", "request.ratio", "must be greater than 0, is -1"),
        ("request.per_class=1000000000000", "request.per_class", "must be less than or equal to 1"),
        ("request.per_class=1e12", "request.per_class", "must be "),
        (
            "request.per_class=1",
            "request",
            "needs exactly one of ratio, balance_to, per_class, ratio_by_class and allocate; has",
        ),
        ("request.shard_size=0", "request.shard_size", "must be greater than or equal to 1"),
        ("generators={A b: {name: ddpm}}", "generators.A b", "a name is a lowercase letter"),
        ("generators={x: {name: gan}}", "generators.x", "no generator named 'gan'"),
        ("generators=3", "generators", "must be a valid dictionary, is 3"),
        ("generators.ddpm.train_steps=-1", "generators.ddpm.train_steps", "must be greater than"),
        ("embedder={name: clip, trust_remote_code: true}", "embedder.trust_remote_code", "no such"),
    ],
)
def test_wrong_field_is_named_with_what_it_must_be(
    write: Write, setting: str, field: str, reason: str
) -> None:
    text = refusal(write(DIGITS), setting)
    assert f"{field}: " in text
    assert reason in text


def test_wrong_number_of_clusters_is_named(write: Write) -> None:
    text = refusal(write(DIGITS), "cluster.k=0")
    assert "cluster.k" in text
    assert "must be greater than or equal to 1, is 0" in text


@pytest.mark.parametrize("value", ["-1", "0", ".nan", ".inf", "1000000000000"])
def test_non_positive_ratio_is_rejected(write: Write, value: str) -> None:
    path = write(DIGITS.replace("ratio: 4", f"ratio: {value}"))
    assert "request.ratio: must be " in refusal(path)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"runtime": "slurm"}, "runtime: must be 'ray' or 'inline'"),
        ({"stages": {"embed": {"actors": 0}}}, "stages.embed.actors: must be greater"),
        ({"stages": {"embde": {}}}, "stages.embde.[key]: must be 'default'"),
        ({"storage": None}, "storage: must be a valid string"),
        ({"num_cpu": 4}, "num_cpu: no such field"),
        ([], "must be a mapping"),
    ],
)
def test_wrong_profile_is_rejected_like_a_study(values: Any, text: str) -> None:
    with pytest.raises(StudyError, match=r"^profile: ") as caught:
        validate(Profile, values, "profile")
    assert text in str(caught.value)


def test_command_line_prints_one_line_and_exits_with_2(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    storage = f"profile.storage={tmp_path / 'runs'}"
    code = run_study([str(write(DIGITS)), "--set", "split.val=2", "--set", storage])
    output = capsys.readouterr()
    assert code == 2
    lines = (output.out + output.err).splitlines()
    assert len(lines) == 1
    assert "error: " in lines[0]
    assert "split.val: must be less than 1, is 2" in lines[0]
    assert not (tmp_path / "runs").exists()


# Fuzz -------------------------------------------------------------------------------------------


def outcome(read: Callable[[], Study]) -> str:
    """The outcome of reading a study; any exception but `StudyError` propagates."""
    try:
        keys = [step.key for step in plan(read())]
    except StudyError as error:
        text = str(error)
        text.encode()
        return "refused in one line" if len(text.splitlines()) == 1 else f"refused: {text!r}"
    return "planned" if keys and all(len(key) == 16 for key in keys) else f"planned: {keys}"


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**5000, 10**5001)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["ddpm", "csv", "pixels", "auto", "all", "../x", "{text}", "a\nb", "\x1b[1m"])
    | st.binary(max_size=5)
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.just("name"), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(values: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values within nested mappings and lists."""
    found = [above]
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    if isinstance(values, dict | list):
        for key, value in inner:
            found += (
                places(value, (*above, key)) if isinstance(value, dict | list) else [(*above, key)]
            )
    return found


def mutated(values: Any, data: st.DataObject) -> Any:
    """One change: a value replaced or removed, a field added, or a value copied from elsewhere."""
    way = data.draw(st.sampled_from(places(values)[1:]))
    holder = values
    for key in way[:-1]:
        holder = holder[key]
    change = data.draw(st.sampled_from(["replace", "remove", "add", "number", "copy"]))
    if change == "remove":
        del holder[way[-1]]
    elif change == "add" and isinstance(holder, dict):
        holder[data.draw(st.text(max_size=8) | st.integers())] = data.draw(junk)
    elif change == "number":
        numbers = [0, -1, 1e12, 10**12, float("nan"), float("inf"), 0.5, 2**63, True, "1"]
        holder[way[-1]] = data.draw(st.sampled_from(numbers))
    elif change == "copy":
        source = values
        for key in data.draw(st.sampled_from(places(values)[1:])):
            source = source[key]
        holder[way[-1]] = copy.deepcopy(source)
    else:
        holder[way[-1]] = data.draw(junk)
    return values


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mutated_study_is_planned_or_rejected_in_one_line(data: st.DataObject) -> None:
    values = copy.deepcopy(VALUES)
    for _ in range(data.draw(st.integers(1, 3))):
        values = mutated(values, data)
    assert outcome(lambda: validate(Study, values, "fuzz")) in ("planned", "refused in one line")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_study_text_is_planned_or_rejected_in_one_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    text = DIGITS
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 6))
        tokens = st.sampled_from(
            ["&a ", "*a", "!!int ", "!!set ", "? ", "- ", "{", "]", '"\\ud83d"']
        )
        text = text[:place] + data.draw(tokens | st.text(max_size=4)) + text[place + length :]
    path.write_text(text, "utf-8", errors="replace")
    assert outcome(lambda: load_study(path)) in ("planned", "refused in one line")


def test_with_cuda_every_accelerated_stage_must_request_a_gpu() -> None:
    """Ray hides GPUs from workers that request none."""
    stages = {name: {"gpus": 1} for name in ("embed", "generate", "classify")}
    whole = {"device": "cuda", "stages": stages, "fit": {"gpus": 1}, "trial": {"gpus": 0.25}}
    assert validate(Profile, whole, "profile").trial.gpus == 0.25
    for missing in ("fit", "trial"):
        with pytest.raises(StudyError, match=rf"device: cuda needs {missing}\.gpus above 0"):
            validate(Profile, {**whole, missing: {}}, "profile")
    without = {**stages, "classify": {}}
    with pytest.raises(StudyError, match=r"needs stages\.classify\.gpus above 0"):
        validate(Profile, {**whole, "stages": without}, "profile")
    with pytest.raises(StudyError, match=r"trial\.gpus asks for a GPU, but device is cpu"):
        validate(Profile, {"trial": {"gpus": 1}}, "profile")
    for shared in ("fit", "trial"):
        workers = {**whole, shared: {"gpus": 0.5, "workers": 2}}
        with pytest.raises(StudyError, match=rf"{shared}\.gpus: NCCL cannot connect two"):
            validate(Profile, workers, "profile")


def test_offloading_needs_a_gpu() -> None:
    with pytest.raises(StudyError, match=r"stages\.generate\.offload saves GPU memory"):
        validate(Profile, {"stages": {"generate": {"offload": "model"}}}, "profile")

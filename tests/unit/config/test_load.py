from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config.load import (
    apply_overrides,
    expand_env,
    load_serve_file,
    validate_args,
    validate_section,
)
from serve_app.config.schema import AppConfig, BatchingSection
from serve_app.core.errors import ConfigError


def write(path: Path, **changes: Any) -> Path:
    """Write a small, right config file with `changes` to its application."""
    application = {"name": "a", "import_path": "serve_app:build_app", "args": {}, **changes}
    document = {"http_options": {"host": "127.0.0.1", "port": 8123}, "applications": [application]}
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"engin": {}}, "args.engin: unknown key; did you mean 'engine'?"),
        (
            {"engine": {"max_num_seq": 3}},
            "args.engine.max_num_seq: unknown key; did you mean 'max_num_seqs'?",
        ),
        (
            {"model_replica": {"autoscaling": {"max_replica": 3}}},
            "args.model_replica.autoscaling.max_replica: unknown key; did you mean 'max_replicas'?",
        ),
        (
            {"preprocessor": {"micro_batching": {"zzz": 1}}},
            "args.preprocessor.micro_batching.zzz: unknown key;"
            " known: batch_wait_timeout_s, enabled, max_batch_size",
        ),
        (
            {"engine": {"max_num_seqs": 0}},
            "args.engine.max_num_seqs: input should be greater than or equal to 1 (got 0)",
        ),
        (
            {"model_replica": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}},
            "args.model_replica.autoscaling: max_replicas (2) is less than min_replicas (3)",
        ),
    ],
)
def test_a_bad_key_or_value_is_named_with_its_cure(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        validate_args(args)

    assert failure.value.message == message


def test_many_problems_stay_one_line() -> None:
    with pytest.raises(ConfigError) as failure:
        validate_args({"model": {f"key{i}": 1 for i in range(9)}})

    assert "and 5 more" in failure.value.message
    assert "\n" not in failure.value.message


def test_a_bare_off_in_yaml_is_the_mode() -> None:
    values = yaml.safe_load("{mode: off}")

    assert values == {"mode": False}, "this is why it has to be handled"
    assert validate_section(BatchingSection, values, "batching").mode == "off"


def test_references_are_replaced_and_keep_their_type() -> None:
    env = {"MODEL": "/m", "SEQS": "7", "EMPTY": ""}

    assert expand_env({"a": ["${MODEL}/x", "${SEQS}", "${NONE:-1.5}"]}, env) == {
        "a": ["/m/x", 7, 1.5]
    }
    assert expand_env("${EMPTY:-d}", env) == "d"
    with pytest.raises(ConfigError, match="the environment variable NONE is not set"):
        expand_env("${NONE}", env)


def test_overrides_change_a_copy() -> None:
    args = {"engine": {"max_num_seqs": 4}}

    changed = apply_overrides(
        args, ["engine.max_num_seqs=8", "model.aliases=['*']", "logging.level=DEBUG"]
    )

    assert args == {"engine": {"max_num_seqs": 4}}
    config = validate_args(changed)
    assert config.engine.max_num_seqs == 8
    assert config.model.aliases == ("*",)
    assert config.logging.level == "DEBUG"


@pytest.mark.parametrize("override", ["engine", "=3", "engine..x=1"])
def test_an_override_without_a_path_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        apply_overrides({}, [override])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine is not a section"):
        apply_overrides({"engine": 3}, ["engine.kind=native"])


def test_a_right_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", args={"model": {"aliases": ["*"]}}, route_prefix="/x")

    file = load_serve_file(path, ["engine.max_num_seqs=2"])

    assert (file.host, file.port, file.app_name, file.route_prefix) == (
        "127.0.0.1",
        8123,
        "a",
        "/x",
    )
    assert file.app == AppConfig.model_validate(
        {"model": {"aliases": ["*"]}, "engine": {"max_num_seqs": 2}}
    )
    assert file.document["applications"][0]["args"]["engine"] == {"max_num_seqs": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"argz": {}}, "applications[0].argz: unknown key; did you mean 'args'?"),
        (
            {"deployments": [{"name": "ModelReplica", "max_ongoing_request": 3}]},
            "applications[0].deployments[0].max_ongoing_request: unknown key;"
            " did you mean 'max_ongoing_requests'?",
        ),
        (
            {"deployments": [{"name": "ModelReplicas"}]},
            "applications[0].deployments[0].name: unknown 'ModelReplicas';"
            " did you mean 'ModelReplica'?",
        ),
        (
            {"deployments": [{"name": "ModelReplica", "user_config": {"batchin": {}}}]},
            "applications[0].deployments[0].user_config.batchin: unknown key;"
            " did you mean 'batching'?",
        ),
        (
            {"deployments": [{"name": "Ingress", "user_config": {"canar": None}}]},
            "applications[0].deployments[0].user_config.canar: unknown key; did you mean 'canary'?",
        ),
    ],
)
def test_serves_own_misspelt_keys_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as failure:
        load_serve_file(write(tmp_path / "c.yaml", **changes))

    assert failure.value.message == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http_optionz: {}\n", "http_optionz: unknown key; did you mean 'http_options'"),
        ("http_options: {prt: 1}\n", "http_options.prt: unknown key; did you mean 'port'"),
        ("- 1\n", "expected a Serve config file"),
        ("a: [\n", "line 2"),
        (
            "applications:\n- args:\n    a: 1\n    a: 2\n",
            "line 4, column 5: the key 'a' stands twice",
        ),
        ("applications: []\n", "expected one application with import_path serve_app:build_app"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as failure:
        load_serve_file(path)
    assert message in failure.value.message


@pytest.mark.parametrize("port", [0, 70000, "8000", True])
def test_a_port_that_is_none_is_refused(tmp_path: Path, port: object) -> None:
    path = write(tmp_path / "c.yaml")
    document = yaml.safe_load(path.read_text())
    document["http_options"]["port"] = port
    path.write_text(yaml.safe_dump(document))

    with pytest.raises(ConfigError, match=r"http_options\.port: expected a port"):
        load_serve_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*none\.yaml"):
        load_serve_file(tmp_path / "none.yaml")


def test_num_replicas_beside_autoscaling_is_refused():
    section = {"num_replicas": 64, "autoscaling": {"min_replicas": 1, "max_replicas": 2}}
    with pytest.raises(ConfigError, match="num_replicas and autoscaling exclude each other"):
        validate_args({"model_replica": section})


def test_a_model_in_place_of_a_config_is_told_so(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\x00")
    with pytest.raises(ConfigError, match="a model, where a config is asked for"):
        load_serve_file(path)

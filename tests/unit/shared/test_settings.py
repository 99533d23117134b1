"""Settings: documentation, precedence, and error messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from scripts.docs import settings
from shared.environment import misspelled_names
from shared.load_settings import faults, load_settings
from shared.redis.urls import Tls, parse
from shared.settings import ROOT, Settings


def test_example_and_configuration_page_are_up_to_date() -> None:
    assert settings.EXAMPLE.read_text() == settings.example()
    assert settings.PAGE.read_text() == settings.page()


def test_every_setting_is_documented_with_its_meaning_type_and_readers() -> None:
    variables = settings.variables()
    assert {v.name for v in variables} == {name.upper() for name in Settings.model_fields}
    assert [v.name for v in variables if not (v.meaning and v.type and v.section and v.readers)] == []


def test_environment_has_precedence_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env").write_text("PORT=1234\nSLOTS=7\nWORKERS=\n")
    monkeypatch.setenv("PORT", "4321")
    settings = Settings(_env_file=tmp_path / "env")
    assert (settings.port, settings.slots, settings.workers) == (4321, 7, 1)


def test_relative_paths_are_resolved_against_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATA_DIR", "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert Settings(_env_file=None).data_dir == ROOT / "elsewhere"


INVALID = [
    ("RATE_LIMIT", "foo"),
    ("RATE_LIMIT", "5/fortnight"),
    ("PORT", "70000"),
    ("SLOTS", "many"),
    ("LEASE_S", "0"),
    ("LOG_LEVEL", "x"),
    ("REDIS_URL", "sentinel://h"),
    ("BROKER_URL", "sentinel://h"),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_invalid_value_is_reported_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings(_env_file=None)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DEADLINE_S": "604801"}, "DEADLINE_S (604801) is more than MAX_DEADLINE_S (604800)"),
        ({"MAX_DEADLINE_S": "60"}, "DEADLINE_S (86400) is more than MAX_DEADLINE_S (60)"),
        ({"MAX_START_WITHIN_S": "0.5"}, "START_WITHIN_S (86400) is more than MAX_START_WITHIN_S (0.5)"),
        ({"LOG_RETENTION_S": "60", "RETENTION_S": "59"}, "LOG_RETENTION_S (60) is more than RETENTION_S (59)"),
    ],
)
def test_contradicting_limits_are_reported_by_name(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None)
    (error,) = caught.value.errors()
    assert error["msg"] == f"Value error, {message}"
    assert str(error["loc"][0]).upper() in message


def test_limits_may_be_equal_and_an_invalid_limit_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    equal = {"DEADLINE_S": "60", "MAX_DEADLINE_S": "60", "RETENTION_S": "60", "LOG_RETENTION_S": "60"}
    for name, value in equal.items():
        monkeypatch.setenv(name, value)
    settings = Settings(_env_file=None)
    assert (settings.max_deadline_s, settings.log_retention_s) == (60, 60)
    monkeypatch.setenv("DEADLINE_S", "soon")
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None)
    assert [error["loc"] for error in caught.value.errors()] == [("deadline_s",)]


@pytest.mark.parametrize(
    ("variables", "store", "broker"),
    [
        ({"DATA_DIR": "/d"}, "unix:///d/run/valkey.sock", "unix:///d/run/valkey.sock"),
        ({"REDIS_URL": "redis://h:1/2"}, "redis://h:1/2", "redis://h:1/2"),
        ({"REDIS_URL": "redis://h:1/2", "BROKER_URL": "redis://b"}, "redis://h:1/2", "redis://b"),
    ],
)
def test_broker_is_the_queues_redis_unless_another_is_set(
    variables: dict[str, str], store: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings(_env_file=None)
    assert (settings.store_url, settings.celery_url) == (store, broker)


@pytest.mark.parametrize(("name", "value"), [("FLOWER_USER", "a:b"), ("FLOWER_USER", "é"), ("FLOWER_PASSWORD", "é")])
def test_flower_credentials_that_it_cannot_compare_are_rejected(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert faults(caught.value).startswith(f"{name}: ")
    assert value not in faults(caught.value)


def test_tls_files_are_part_of_the_urls_that_use_tls(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("the ca", "cert", "key")]
    settings = Settings(
        _env_file=None,
        redis_url="rediss://h/1",
        broker_url="sentinel://h?master=m&tls=true&ssl_ca_certs=/own",
        redis_ca_file=files[0],
        redis_cert_file=files[1],
        redis_key_file=files[2],
    )
    ca, cert, key = map(str, files)
    assert parse(settings.store_url).tls == Tls(ca, cert, key)
    assert parse(settings.celery_url).tls == Tls("/own", cert, key)
    plain = Settings(_env_file=None, redis_url="redis://h", broker_url="amqp://h", redis_ca_file=files[0])
    assert (plain.store_url, plain.celery_url) == ("redis://h", "amqp://h")


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"REDIS_CA_FILE": "{}/missing"}, "REDIS_CA_FILE: {}/missing does not exist or cannot be read"),
        ({"REDIS_URL": "redis://h"}, "REDIS_CA_FILE: neither REDIS_URL nor BROKER_URL uses TLS"),
        ({"REDIS_URL": ""}, "REDIS_CA_FILE: neither REDIS_URL nor BROKER_URL uses TLS"),
        ({"REDIS_KEY_FILE": "{}/file"}, "REDIS_KEY_FILE: set REDIS_CERT_FILE, too"),
        ({"REDIS_URL": "redis://h", "BROKER_URL": "rediss://h"}, ""),
        ({}, ""),
    ],
)
def test_tls_files_that_would_be_ignored_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], error: str
) -> None:
    (tmp_path / "file").touch()
    for name, value in {"REDIS_URL": "rediss://h", "REDIS_CA_FILE": "{}/file", **variables}.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    if not error:
        assert load_settings().redis_ca_file == tmp_path / "file"
        return
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert faults(caught.value).startswith(error.format(tmp_path)) and "\n" not in faults(caught.value)


def names(error: ValidationError) -> list[str]:
    return [line.partition(":")[0] for line in faults(error).splitlines()]


def test_unknown_name_in_the_file_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "{env}"
    file.write_text("SLOT=4\nPORT=1234\nREDIS_PORT=1\nCOMPOSE_PROJECT_NAME=x\nELSEWHERE=1\n")
    monkeypatch.setattr("shared.load_settings.ENV_FILE", file)
    with pytest.raises(ValidationError) as caught:
        load_settings()
    slot, elsewhere = faults(caught.value).splitlines()
    assert slot == f"SLOT: no such setting (in {file}); did you mean SLOTS?"
    assert elsewhere == f"ELSEWHERE: no such setting (in {file})"


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_setting_with_a_missing_letter_is_recognised(name: str) -> None:
    setting = name.upper()
    misspelled = setting[:-1] if len(setting) > 4 else setting + "S"
    names = [misspelled, setting, "PATH", "HOSTNAME", "HOME", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
    assert misspelled_names(names, Settings.model_fields) == {misspelled: setting}


@pytest.mark.parametrize("name", ["ENV_FILE", "MODELS_FILE"])
def test_file_that_is_set_explicitly_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("shared.load_settings.ENV_FILE", Path(os.devnull))
    monkeypatch.setenv(name, str(tmp_path / "missing"))
    if name == "ENV_FILE":
        monkeypatch.setattr("shared.load_settings.ENV_FILE", tmp_path / "missing")
        assert load_settings(env_file_may_be_missing=True)
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert names(caught.value) == [name]
    assert str(tmp_path / "missing") in faults(caught.value)

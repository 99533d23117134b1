"""scripts/keys: output, stored keys and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.stack import keys, serve
from scripts.stack.failure import StartFailed
from scripts.stack.terminal import Terminal
from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Priority
from shared.load_settings import load_settings
from web.access.api_keys import KeyStore, new_key


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyStore:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("RATE_LIMIT", "100/minute")
    return KeyStore(tmp_path / "keys.json")


def test_stdout_is_only_the_key(store: KeyStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["create", "laptop", "--scope", "admin", "--scope", "infer", "--rate-limit", "5/second"]) == 0
    found = store.find(capsys.readouterr().out.strip())
    assert found is not None
    assert (found.name, found.scopes, found.rate_limit) == ("laptop", {"infer", "admin"}, "5/second")


def test_the_default_scope_is_infer(store: KeyStore) -> None:
    keys.main(["create", "laptop"])
    assert [key.scopes for key in store.list()] == [{"infer"}]


def test_the_list_shows_limits_and_revocations_but_no_key(store: KeyStore, capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["create", "old"])
    keys.main(["create", "new", "--rate-limit", "7/hour"])
    secrets = capsys.readouterr().out.split()
    keys.main(["revoke", "old"])
    capsys.readouterr()

    assert keys.main(["list"]) == 0
    heading, old, new = capsys.readouterr().out.splitlines()
    assert heading.split() == list(keys.COLUMNS)
    assert old.split()[1:4] == ["old", "infer", "100/minute"]
    assert not old.endswith(" -")
    assert new.split()[1:4] == ["new", "infer", "7/hour"]
    assert new.endswith(" -")
    assert not any(secret in old + new for secret in secrets)


def test_a_key_can_be_revoked_by_its_id(store: KeyStore) -> None:
    key = store.create("laptop", ["infer"])
    assert keys.main(["revoke", key.split("_")[1]]) == 0
    assert store.find(key) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"keys": [null]}', '{"keys": [{"id": "x"}]}'])
@pytest.mark.parametrize("arguments", [["create", "laptop"], ["list"], ["revoke", "laptop"]])
def test_a_damaged_file_is_named_with_the_fix(
    store: KeyStore, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, arguments: list[str]
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    assert keys.main(arguments) == 1
    fix = "restore it from a backup, or delete it and create the API keys again"
    assert capfd.readouterr() == ("", f"keys: {file} is damaged: {fix}\n")
    assert file.read_text() == content


def test_serve_names_a_damaged_file_too(store: KeyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQ_API_KEY", new_key())
    monkeypatch.setenv("FLOWER_PASSWORD", "secret")
    (tmp_path / "keys.json").touch()
    with pytest.raises(StartFailed, match=rf"^{tmp_path}/keys.json is damaged: "):
        serve.register_secrets(load_settings(), Terminal())


def test_the_local_key_may_only_infer(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    monkeypatch.setenv("MLXQ_API_KEY", key)
    monkeypatch.setenv("FLOWER_PASSWORD", "secret")
    serve.register_secrets(load_settings(), Terminal())
    local = store.find(key)
    assert local is not None
    assert (local.name, local.scopes) == ("local", {"infer"})


def test_a_missing_data_dir_is_created_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    assert keys.main(["create", "laptop"]) == 0
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "arguments",
    [["create", "taken"], ["create", "other", "--rate-limit", "a lot"], ["revoke", "nobody"]],
)
def test_an_error_is_one_line_on_stderr(
    store: KeyStore, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    store.create("taken", ["infer"])
    assert keys.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


def test_a_key_has_its_own_limits_and_a_normal_priority_by_default(
    store: KeyStore, capsys: pytest.CaptureFixture[str]
) -> None:
    keys.main(["create", "plain"])
    keys.main(["create", "limited", "--max-queued", "7", "--max-priority", "high"])
    assert [(key.limits.max_queued, key.max_priority) for key in store.list()] == [
        (None, Priority.NORMAL),
        (7, Priority.HIGH),
    ]
    capsys.readouterr()
    keys.main(["list"])
    _, plain, limited = capsys.readouterr().out.splitlines()
    assert (plain.split()[4:6], limited.split()[4:6]) == (["default", "normal"], ["7", "high"])
    assert keys.main(["create", "none", "--max-queued", "0"]) == 1


def test_limits_are_changed_shown_and_removed(store: KeyStore, capsys: pytest.CaptureFixture[str]) -> None:
    key = store.create("team", ["infer"], "5/minute", limits=OwnerLimits(max_queued=7))
    arguments = ["--weight", "2.5", "--max-running", "4", "--tokens-per-minute", "6000", "--tokens-per-day", "0"]
    assert keys.main(["limit", "team", *arguments, "--max-priority", "batch"]) == 0
    found = store.find(key)
    assert found is not None and found.limits == OwnerLimits(2.5, 7, None, 4, 6000, 0)
    assert (found.rate_limit, found.max_priority) == ("5/minute", Priority.BATCH)
    assert keys.main(["limit", found.id, "--max-queued", "default", "--rate-limit", "default"]) == 0
    capsys.readouterr()
    assert keys.main(["show", "team"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["weight"], shown["max_running"], shown["tokens_per_day"]) == ("2.5", "4", "unlimited")
    assert (shown["max_queued"], shown["rate_limit"]) == ("default (2500)", "default (100/minute)")


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        *(("--weight", text, "weight") for text in ("0", "-1", "101", "nan", "inf")),
        *(
            (f"--{name}", "-1", name.replace("-", "_"))
            for name in ("max-running", "tokens-per-minute", "tokens-per-day")
        ),
        ("--rate-limit", "a lot", "rate_limit"),
    ],
)
def test_an_invalid_limit_is_named(
    store: KeyStore, capsys: pytest.CaptureFixture[str], option: str, value: str, field: str
) -> None:
    before = store.create("team", ["infer"])
    assert keys.main(["limit", "team", f"{option}={value}"]) == 1
    assert capsys.readouterr().err.startswith(f"keys: {field} must be ")
    found = store.find(before)
    assert found is not None and found.limits == OwnerLimits()

"""What the containers of compose.yaml need before they start: `python -m scripts.stack.container_setup ACTION`.

create          the passwords of the Redis users, Redis's list of users, and the secrets of the API and of Flower
observability   an API key for Prometheus and the password of Grafana's admin
show NAME       print a secret, for a person
files DIR HOST  write the files of `create` for a Redis on another host, such as for Kubernetes

Each service mounts only the volume with its own secrets. Existing secrets are kept; the list of Redis users is written
anew, so that it has the permissions of this version.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import redis
from dotenv import dotenv_values

from scripts.stack.env_file import add_missing
from shared.redis.client import connect
from shared.settings import ROOT, Settings
from web.access.api_keys import KeyStore, new_key

SECRETS: Final = Path("/secrets")
"""The volumes, one folder for each."""
REDIS: Final = "redis"
"""Redis's host name in compose.yaml."""
KEYS_FILE: Final = Path("/data/keys.json")
PROCESSES: Final = ("web", "background", "worker", "flower")
"""Processes with a Redis user of their own."""
USERS: Final = ROOT / "deploy/redis/users.acl"
_EXTRA_USERS: Final = """\
user mlxq-health on nopass -@all +ping
user mlxq-setup on >SETUP_PASSWORD -@all +auth +hello +select +client|setinfo +client|setname +ping +acl|load
"""
"""Users of the health check of Redis, and of this module, which makes a running Redis read its list of users again."""
_TIMEOUT_S: Final = 2.0
_SHOW: Final = "docker compose run --rm init show"


def create(folder: Path, host: str = REDIS) -> None:
    """Create the missing secrets below a folder, and write Redis's list of users."""
    for process in PROCESSES:
        add_missing(_env(folder, process), {"REDIS_URL": _redis_url(f"mlxq-{process}", _password(), host)})
    add_missing(_env(folder, "web"), {"MLXQ_API_KEY": new_key()})
    add_missing(_env(folder, "flower"), {"FLOWER_PASSWORD": _password()})
    # The volume of Redis is mounted by Redis too, which runs as another user and cannot read this file.
    add_missing(folder / "redis/setup.env", {"SETUP_PASSWORD": _password()})
    _write(folder / "redis/users.acl", _users(folder))


def setup_url(folder: Path) -> str:
    """Return the URL of Redis for the user that may make it read its list of users."""
    return _redis_url("mlxq-setup", _read(folder / "redis/setup.env", "SETUP_PASSWORD"))


def reload_users(url: str) -> None:
    """Make a running Redis read its list of users again. A Redis that does not run yet reads it when it starts."""
    with connect(url, timeout_s=_TIMEOUT_S, retries=0) as client:
        try:
            client.execute_command("ACL", "LOAD")
        except (redis.ConnectionError, redis.TimeoutError) as error:  # also: it does not know the user yet
            print(f"Redis will read its users when it starts ({type(error).__name__})")


def observability(folder: Path, keys: KeyStore) -> None:
    """Create what Prometheus and Grafana need."""
    key_file = folder / "prometheus/mlxq.key"
    if not (key_file.exists() and keys.find(key_file.read_text())):
        _write(key_file, keys.create("prometheus", {"infer"}))
    password_file = folder / "grafana/password"
    if not password_file.exists():
        _write(password_file, _password())


def show(folder: Path, name: str, environment: Mapping[str, str]) -> str:
    """Return a secret.

    Raises:
        SystemExit: the name is unknown, or the secret has not been created.
    """
    if name in ("MLXQ_API_KEY", "FLOWER_PASSWORD") and environment.get(name):
        return environment[name]
    try:
        if name == "REDIS_URL":  # for a worker on the host
            url = _read(_env(folder, "worker"), name)
            return url.replace(f"@{REDIS}:6379/", f"@127.0.0.1:{environment['REDIS_PORT']}/")
        if name == "GRAFANA_PASSWORD":
            return (folder / "grafana/password").read_text()
        return _read(_env(folder, {"MLXQ_API_KEY": "web", "FLOWER_PASSWORD": "flower"}[name]), name)
    except KeyError:
        sys.exit(
            "known are MLXQ_API_KEY, FLOWER_PASSWORD, GRAFANA_PASSWORD and REDIS_URL (of a worker on this machine)"
        )
    except FileNotFoundError:
        sys.exit(f"{name} has not been created yet: run docker compose up")


def next_steps(environment: Mapping[str, str]) -> str:
    """Return what a person needs after the start."""
    user = environment.get("FLOWER_USER") or Settings.model_fields["flower_user"].default
    return f"""\
API       http://127.0.0.1:{environment["PORT"]}   key: {_SHOW} MLXQ_API_KEY
Flower    http://127.0.0.1:{environment["FLOWER_PORT"]}   user {user}, password: {_SHOW} FLOWER_PASSWORD
workers   Jobs wait until a worker runs. In a container (Linux): docker compose --profile worker up
          On a Mac, natively, because containers cannot use its GPU:
            scripts/fetch_model
            REDIS_URL="$({_SHOW} REDIS_URL)" scripts/worker"""


def _users(folder: Path) -> str:
    text = USERS.read_text() + _EXTRA_USERS
    passwords = {process: _password_in(_read(_env(folder, process), "REDIS_URL")) for process in PROCESSES}
    passwords["setup"] = _read(folder / "redis/setup.env", "SETUP_PASSWORD")
    for name, password in passwords.items():
        # Redis accepts the hash in place of the password.
        text = text.replace(f">{name.upper()}_PASSWORD ", f"#{hashlib.sha256(password.encode()).hexdigest()} ")
    return text


def _env(folder: Path, process: str) -> Path:
    return folder / process / "env"


def _redis_url(user: str, password: str, host: str = REDIS) -> str:
    return f"redis://{user}:{password}@{host}:6379/0"


def _password_in(url: str) -> str:
    return url.partition("@")[0].rpartition(":")[2]


def _password() -> str:
    return secrets.token_hex(24)


def _read(path: Path, name: str) -> str:
    value = dotenv_values(path).get(name)  # a missing file has no values
    if value is None:
        raise FileNotFoundError(f"{path} has no {name}")
    return value


def _write(path: Path, text: str) -> None:
    """Write a file that the service's user, which is not the owner, can read; readers never see a part of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o644)
    new.replace(path)


def main(action: str, *names: str) -> int:
    """Run an action; return the exit status."""
    if action == "show":
        print(show(SECRETS, " ".join(names), os.environ))
    elif action == "observability":
        observability(SECRETS, KeyStore(KEYS_FILE))
        print(
            f"Grafana   http://127.0.0.1:{os.environ['GRAFANA_PORT']}   user admin, password: {_SHOW} GRAFANA_PASSWORD"
        )
    elif action == "files":
        folder, host = names
        create(Path(folder), host)
    else:
        create(SECRETS)
        reload_users(setup_url(SECRETS))
        print(next_steps(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The server as an application of Ray Serve, which starts replicas, restarts those that die, and scales them.

    serve run infer/serve/deploy/ray.yaml

Each replica is a process with an engine of its own, behind the same ASGI application as the command's. Ray's proxy
listens; a WebSocket stays on its replica. Requests with the same `x-session-id` header go to the same replica, where a
realtime client that comes back finds its session.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from omni_jax.errors import InputError
from omni_jax.infer.serve.app import make_app
from omni_jax.infer.serve.loading import load_replica
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.warmup import prepare
from omni_jax.settings import GenerationSettings, MediaSettings, ModelSettings, SpeechSettings, build, change

NAME = "omni-jax"
GROUPS = {
    "model": ModelSettings, "options": ServeOptions, "generation": GenerationSettings, "media": MediaSettings,
    "speech": SpeechSettings,
}  # fmt: skip
# Requests that Ray hands to a replica beyond those that it serves or keeps waiting: probes, and those that the replica
# refuses itself, by an answer that says when to come again.
BEYOND = 64


class Served:
    """A replica in a process of Ray's, which sends it requests as soon as it is made: then it is warm."""

    def __init__(self, settings: Mapping[str, Any]):
        self._replica = load_replica(**settings)
        if not settings["options"].no_warmup:
            prepare(self._replica)
        self._replica.start()

    def __serve_build_asgi_app__(self) -> Any:
        """For Ray."""
        return make_app(self._replica)

    def check_health(self) -> None:
        """For Ray, which starts another replica in place of one whose engine has stopped. Raises ApiError then."""
        self._replica.check_alive()

    def __del__(self) -> None:
        """Ray has let the requests end."""
        if hasattr(self, "_replica"):
            self._replica.stop()


def read(args: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a replica.

    Args:
      args: by group (see GROUPS), fields by name, as the command has them; `model` may be the name of a checkpoint.
    Raises:
      InputError: no model, a group or field that there is not, or a value that it cannot have.
    """
    for name in args:
        if name not in GROUPS:
            raise InputError(f"there are no settings {name!r}; known are {', '.join(GROUPS)}")
    given = {name: args.get(name) or {} for name in GROUPS}
    if isinstance(given["model"], str):
        given["model"] = {"model": given["model"]}
    for name, fields in given.items():
        if not isinstance(fields, Mapping):
            raise InputError(f"the settings {name} are {str(fields)[:60]!r}; give fields by name")
    model = dict(given.pop("model"))
    if "model" not in model:
        raise InputError("there is no model; give the name of a checkpoint")
    found: dict[str, Any] = {name: build(GROUPS[name], fields, f"setting of {name}") for name, fields in given.items()}
    return {"model": change(ModelSettings(model.pop("model")), model, "setting of model"), **found}


def application(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve run` and Ray's configuration files. Replicas, their resources and autoscaling are
    settings of the deployment `omni-jax` there. Raises InputError, see `read`."""
    settings = read(args)
    options = settings["options"]
    deployment = serve.deployment(
        serve.ingress()(Served), name=NAME, max_ongoing_requests=options.max_sessions + options.max_waiting + BEYOND,
        graceful_shutdown_timeout_s=options.drain_seconds,
        request_router_config={
            "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
        },
    )  # fmt: skip
    return deployment.bind(settings)

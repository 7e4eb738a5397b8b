"""What stands in the image and in the manifests fits the command that they start."""

from __future__ import annotations

import pathlib
import re

import yaml

from omni_jax.infer.serve.options import ServeOptions

ROOT = pathlib.Path(__file__).parents[3]
DEPLOY = ROOT / "infer" / "serve" / "deploy"


def load(name):
    return yaml.safe_load((DEPLOY / "kubernetes" / name).read_text("utf-8"))


def test_the_deployment_fits_the_server():
    pod = load("base/deployment.yaml")["spec"]["template"]["spec"]
    [server] = pod["containers"]
    flags = dict(zip(server["args"][::2], server["args"][1::2], strict=True))
    names = {"--" + name.replace("_", "-") for name in ServeOptions.__dataclass_fields__} | {"--model"}
    assert set(flags) <= names
    grace = int(server["lifecycle"]["preStop"]["exec"]["command"][1]) + int(flags["--drain-seconds"])
    assert pod["terminationGracePeriodSeconds"] > grace
    assert server["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert server["livenessProbe"]["httpGet"]["path"] == server["startupProbe"]["httpGet"]["path"] == "/health"
    mounts, volumes = ({v["name"] for v in found} for found in (server["volumeMounts"], pod["volumes"]))
    assert mounts == volumes
    [port] = load("base/service.yaml")["spec"]["ports"]
    assert port["targetPort"] in [p["name"] for p in server["ports"]]


def test_variants_change_what_there_is():
    """Patches name paths of the base, and the tags are targets of the Dockerfile."""
    base = load("base/deployment.yaml")
    targets = set(re.findall(r" AS (\w+)", (DEPLOY / "Dockerfile").read_text("utf-8")))
    for name in ("gpu", "tpu"):
        variant = load(f"{name}/kustomization.yaml")
        assert variant["images"][0]["newTag"] in targets
        for change in yaml.safe_load(variant["patches"][0]["patch"]):
            *parents, _ = change["path"].strip("/").split("/")
            at = base
            for step in parents:
                at = at[int(step)] if isinstance(at, list) else at[step]


def test_the_image():
    """It does not run as root, and installs extras that there are."""
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    extras = set(",".join(re.findall(r"\.\[([\w,]+)\]", text)).split(","))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert extras == {"serve", "live", "tpu", "cuda12"}
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    stages = text.split("\nFROM ")[2:]
    assert len(stages) == 3
    assert all("USER 1000" in stage for stage in stages)

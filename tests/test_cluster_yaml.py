"""cluster.yaml is valid under Ray's schema and keeps this project's rules."""

from __future__ import annotations

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    # Found without importing Ray.
    found = find_spec("ray")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "autoscaler" / "ray-schema.json"
    return json.loads(path.read_text("utf-8"))


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))


def _node(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["available_node_types"]["gpu_worker"]


def test_file_is_valid(cluster, schema):
    jsonschema.validate(cluster, schema)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cluster: cluster.update(no_such_field=1),
        lambda cluster: cluster.update(max_workers="four"),
        lambda cluster: cluster["docker"].update(no_such_field=1),
        lambda cluster: cluster.pop("provider"),
        lambda cluster: _node(cluster).pop("node_config"),
        lambda cluster: _node(cluster)["resources"].update(GPU=-1),
        lambda cluster: cluster["head_start_ray_commands"].append(7),
    ],
)
def test_invalid_file_is_rejected(cluster, schema, spoil):
    spoiled = copy.deepcopy(cluster)
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoiled, schema)


def test_numbers_of_workers_agree(cluster):
    """Ray's launcher rejects a minimum number of workers above the maximum, but the schema does
    not."""
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert sum(node.get("min_workers", 0) for node in types.values()) <= cluster["max_workers"]
    for node in types.values():
        assert node.get("min_workers", 0) <= node.get("max_workers", cluster["max_workers"])


def test_every_start_of_ray_requires_the_token(cluster):
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in cluster[kind] if "ray start" in command]
        assert starts
        assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]


def test_head_is_on_demand_and_workers_are_spot(cluster):
    types = cluster["available_node_types"]
    head = types[cluster["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "GPU" not in head["resources"]
    workers = [node for name, node in types.items() if name != cluster["head_node_type"]]
    assert workers
    for node in workers:
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert all("IamInstanceProfile" in node["node_config"] for node in types.values())


def test_versions_equal_the_constraints(cluster):
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert pinned is not None
    images = [cluster["docker"]["image"], cluster["docker"]["head_image"]]
    assert all(f"rayproject/ray:{pinned[1]}-" in image for image in images)


def test_files_copied_to_the_nodes_exist(cluster):
    mounted = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert mounted
    assert all((ROOT / path).is_file() for path in mounted)

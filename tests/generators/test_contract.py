from __future__ import annotations

import ast
from itertools import islice
from pathlib import Path

import pytest

from engine.core.registry import available, resolve
from engine.data.images import Preprocess
from engine.generators import Generator, GeneratorSpec, TrainingRows, proportional


@pytest.mark.parametrize("name", available("generators"))
def test_every_generator_keeps_the_contract(name: str) -> None:
    kind = resolve("generators", name)
    assert issubclass(kind, Generator)
    assert issubclass(kind.Spec, GeneratorSpec)
    assert isinstance(kind.version, int)
    assert set(kind.sampling_fields) <= set(kind.Spec.model_fields)
    document = ast.get_docstring(ast.parse(Path(f"engine/generators/{name}.py").read_text()))
    assert document


def test_every_prefix_of_proportional_follows_the_sizes() -> None:
    sizes = {0: 50, 1: 30, 2: 20}
    clusters = [name for name, count in sizes.items() for _ in range(count)]
    drawn = list(islice(proportional(clusters), 200))
    for length in (10, 37, 100, 200):
        for name, count in sizes.items():
            assert abs(drawn[:length].count(name) - length * count / 100) <= 1


def test_cluster_requests_keep_their_prefix() -> None:
    class Clustered(Generator):
        def uses_clusters(self) -> bool:
            return True

    generator = Clustered(None, Preprocess(size=8))
    train = TrainingRows(["a", "b", "c"], [0, 0, 1])
    assert list(generator.plan("x", 50, train, 1))[:9] == list(generator.plan("x", 9, train, 1))

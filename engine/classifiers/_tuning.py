"""Which weights of a network are trained, and what of it stands still meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from engine.core.errors import StudyError

if TYPE_CHECKING:
    from torch.nn import Module, Parameter


def _known(value: Any) -> Any:
    # One error of the two kinds, where a union has one for each.
    if value in ("all", "head") or (type(value) is int and 1 <= value <= 1000):
        return value
    raise PydanticCustomError(
        "explained", "must be all, head or a number of blocks from 1 on, is {value}",
        {"value": repr(value)[:60]},
    )  # fmt: skip


# all: every weight. head: the last layer alone. A number: so many of the last blocks (a ResNet's
# stages, a transformer's layers), and all that comes after them.
Trained = Annotated[Literal["all", "head"] | int, BeforeValidator(_known)]


def trained_in_words(trained: Trained) -> str:
    if trained == "all":
        return "all weights tuned"
    if trained == "head":
        return "its last layer alone trained"
    return f"last {f'{trained} blocks' if trained > 1 else 'block'} tuned"


def block_list(network: Module) -> Sequence[Module]:
    """The blocks that a network's images pass one after the other: its outermost list of modules,
    or none."""
    from torch.nn import ModuleList

    lists = [(name, held) for name, held in network.named_modules() if isinstance(held, ModuleList)]
    if not lists:
        return ()
    _, found = min(lists, key=lambda entry: entry[0].count("."))
    return list(found)


def freeze(
    network: Module, trained: Trained, blocks: Sequence[Module], head: Iterable[Parameter]
) -> list[Module]:
    """Let only the weights learn that `trained` names; returns the modules that have none of them,
    whose batch normalisation and dropout must stand still.

    blocks: in the order of the network's weights, as what comes after them is. Raises `StudyError`
    where there are fewer than are to be trained.
    """
    if trained == "all":
        return []
    if trained != "head" and trained > len(blocks):
        raise StudyError(
            f"classifier.trained: {trained} blocks, where the network has {len(blocks)}; say"
            f" {'a smaller number, ' if blocks else ''}all or head"
        )
    learning = set(head)
    if trained != "head":
        every = list(network.parameters())
        first = next(blocks[-trained].parameters())
        learning |= set(every[next(n for n, held in enumerate(every) if held is first) :])
    for parameter in network.parameters():
        parameter.requires_grad_(parameter in learning)
    return [
        module
        for module in network.modules()
        if (held := list(module.parameters())) and not any(one.requires_grad for one in held)
    ]

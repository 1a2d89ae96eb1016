"""Which weights of a network are trained, and which modules are frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from engine.core.errors import StudyError
from engine.core.spec import explained

if TYPE_CHECKING:
    from torch.nn import Module, Parameter


def _known(value: Any) -> Any:
    # A single error; a union would report one for each member.
    if value in ("all", "head") or (type(value) is int and 1 <= value <= 1000):
        return value
    raise explained(
        "must be all, head or a number of blocks from 1 to 1000, is {value}", value=repr(value)[:60]
    )  # fmt: skip


# all: every weight. head: only the last layer. A number: that many of the last blocks (stages of a
# ResNet, layers of a transformer) and everything after them.
Trained = Annotated[Literal["all", "head"] | int, BeforeValidator(_known)]


def trained_in_words(trained: Trained) -> str:
    """The trained part as a phrase."""
    if trained == "all":
        return "all weights tuned"
    if trained == "head":
        return "its last layer alone trained"
    return f"last {f'{trained} blocks' if trained > 1 else 'block'} tuned"


def block_list(network: Module) -> Sequence[Module]:
    """The consecutive blocks of a network: its outermost list of modules, or ()."""
    from torch.nn import ModuleList

    lists = [(name, part) for name, part in network.named_modules() if isinstance(part, ModuleList)]
    if not lists:
        return ()
    _, outermost = min(lists, key=lambda entry: entry[0].count("."))
    return list(outermost)


def freeze(
    network: Module, trained: Trained, blocks: Sequence[Module], head: Iterable[Parameter]
) -> list[Module]:
    """Freeze all weights but those that `trained` names.

    blocks: in the order of the network's parameters. Returns the modules without trained weights;
    their batch normalisation and dropout must stay in evaluation mode. Raises `StudyError` where
    `trained` exceeds the number of blocks.
    """
    if trained == "all":
        return []
    if trained != "head" and trained > len(blocks):
        raise StudyError(
            f"classifier.trained: {trained} exceeds the {len(blocks)} blocks of the network; use"
            f" {'a smaller number, ' if blocks else ''}all or head"
        )
    learning = set(head)
    if trained != "head":
        every = list(network.parameters())
        first = next(blocks[-trained].parameters())
        learning |= set(every[next(n for n, weight in enumerate(every) if weight is first) :])
    for parameter in network.parameters():
        parameter.requires_grad_(parameter in learning)
    return [
        module
        for module in network.modules()
        if (weights := list(module.parameters()))
        and not any(weight.requires_grad for weight in weights)
    ]

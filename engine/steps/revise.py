"""Revise: the data with the labels that voters agreed on. Only parts with a changed label are
written again."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Part
from engine.core.spec import Spec
from engine.data.dataset import replace_column
from engine.results.data import IngestResult, ReviseResult
from engine.stages.records import small_class_notices, thin_classes
from engine.steps import StepKind
from engine.steps.ingest import ROW_GROUP


class ReviseSpec(Spec):
    task: str


class Revise(StepKind[ReviseSpec]):
    version = 1
    summary = "replace the labels that voters agreed to be wrong"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(ReviseSpec)
        ingest, data = context.inputs["ingest"], context.result("ingest", IngestResult)
        votes = pa.concat_tables(
            context.store.tables(context.inputs["relabel"].keys(table="votes"))
        )
        changes = votes.filter(votes["changed"])
        new = dict(zip(*(changes[name].to_pylist() for name in (rows.IMAGE_ID, rows.LABEL)),
                       strict=True))  # fmt: skip
        parts, counts = [], {split: Counter[str]() for split in rows.SPLITS}
        changed = Counter[str]()
        with context.progress(len(ingest.parts), "parts") as bar:
            for number, part in enumerate(ingest.parts):
                split = part.tags.get("split")
                if split is not None:
                    part, labels, count = self._revised(context, spec, part, number, new)
                    counts[split].update(labels)
                    changed[split] += count
                parts.append(part)
                bar.advance(1)
        total = sum(changed.values())
        # A class whose images all became others is still a class, as in every other split.
        known = {split: {name: counts[split].get(name, 0) for name in of_split}
                 for split, of_split in data.counts.items()}  # fmt: skip
        for problem in thin_classes(known):
            raise DataError(
                f"relabel: after the changes {problem}; or lower relabel.most, raise relabel.sure,"
                " or raise relabel.needed"
            )
        by_class = {name: {split: known[split].get(name, 0) for split in known}
                    for name in known["train"]}  # fmt: skip
        warnings = [notice for notice in data.warnings if notice.code != "small_class"]
        result = ReviseResult(
            **{
                **{name: getattr(data, name) for name in IngestResult.model_fields},
                "headline": f"{total:,} labels changed", "counts": known,
                "warnings": [*warnings, *small_class_notices(by_class)],
                "relabelled": {split: count for split, count in changed.items() if count},
            }
        )  # fmt: skip
        return Output(parts, ingest.rows, result)

    @staticmethod
    def _revised(
        context: Context, spec: ReviseSpec, part: Part, number: int, new: dict[str, str]
    ) -> tuple[Part, list[str], int]:
        """The part with new labels, the labels, and the number of changed ones."""
        column = rows.label_column(spec.task)
        labelled = pa.concat_tables(context.store.tables([part.key], [rows.IMAGE_ID, column]))
        ids, old = labelled[rows.IMAGE_ID].to_pylist(), labelled[column].to_pylist()
        labels = [new.get(image_id, label) for image_id, label in zip(ids, old, strict=True)]
        count = sum(label != before for label, before in zip(labels, old, strict=True))
        if not count:
            return part, labels, 0
        table = pa.concat_tables(context.store.tables([part.key]))
        revised = replace_column(table, column, labels)
        name = f"{part.tags['split']}-{number:05d}"
        return context.table(name, revised, row_group_size=ROW_GROUP, **part.tags), labels, count

"""Trains an encoder-decoder model to translate from one language into another."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from sacrebleu import corpus_bleu

from training.errors import UserError
from training.options import Options
from training.tasks.sequence_to_sequence import SequenceToSequence

_NESTED = "translation"


class Translation(SequenceToSequence):
    """Columns `source` and `target`; or `translation`, or two of their own, by the codes of the languages."""

    primary: ClassVar[str] = "chrf"
    answer: ClassVar[str] = "translation_text"
    columns: ClassVar[tuple[tuple[str, str], ...]] = (("source", "target"), ("text", "target"), ("text", "translation"))

    def pairs(self, rows: Dataset, path: Path, options: Options) -> Dataset:
        """See the base class. `translation` may hold texts by language, as on the hub: {"en": …, "de": …}."""
        languages = (options.source_lang, options.target_lang)
        if languages == (None, None):
            return super().pairs(rows, path, options)
        if None in languages:
            raise UserError("--source-lang and --target-lang belong together; name both")
        given, wanted = str(options.source_lang), str(options.target_lang)
        if _NESTED in rows.column_names and all(isinstance(texts, dict) for texts in rows[_NESTED]):
            found = {"text": given, "target": wanted}
            return Dataset.from_dict({name: [t.get(code) for t in rows[_NESTED]] for name, code in found.items()})
        if {given, wanted} <= set(rows.column_names):
            return rows.select_columns([given, wanted]).rename_columns({given: "text", wanted: "target"})
        raise UserError(
            f"{path}: there are no columns {given!r} and {wanted!r}, and no {_NESTED!r} with texts by language; the "
            f"file has {', '.join(map(repr, rows.column_names))}"
        )

    def likeness(self, texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        """BLEU."""
        return {"bleu": corpus_bleu(texts, [list(targets)]).score / 100}

"""Translation: a text in another language."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from handler.errors import InvalidParameter
from handler.parameters import CommonParameters
from handler.settings import Settings
from handler.tasks.sequence_to_sequence import SequenceToSequence, SequenceToSequenceParameters, Source


@dataclass(frozen=True, kw_only=True)
class TranslationParameters(SequenceToSequenceParameters):
    """src_lang, tgt_lang: languages of the text and of the answer, for models of many languages, by their codes."""

    src_lang: str | None = None
    tgt_lang: str | None = None


class Translation(SequenceToSequence):
    """Answers with `translation_text`."""

    answer: ClassVar[str] = "translation_text"
    Parameters: ClassVar[type[CommonParameters]] = TranslationParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        super().__init__(model_dir, settings, config)
        # Tokenizers of models for many languages mark a text with the code of its language.
        codes = getattr(self.tokenizer, "lang_code_to_id", None) if hasattr(self.tokenizer, "src_lang") else None
        self._languages: Mapping[str, int] = codes or {}

    def read(self, value: Any, parameters: Any) -> Sequence[Source]:
        """A string."""
        [source] = super().read(value, parameters)
        languages = parameters.src_lang, parameters.tgt_lang
        if languages == (None, None):
            return [source]
        if not self._languages:
            raise InvalidParameter(
                "this model translates from one language into one other; leave out 'src_lang' and 'tgt_lang'"
            )
        if None in languages:
            raise InvalidParameter("send both 'src_lang' and 'tgt_lang', or neither")
        if unknown := [name for name in ("src_lang", "tgt_lang") if getattr(parameters, name) not in self._languages]:
            raise InvalidParameter(f"parameter {unknown[0]!r} must be one of {', '.join(sorted(self._languages))}")
        return [replace(source, languages=languages)]

    def language(self, source: Source) -> dict[str, int]:
        """The token that the answer begins with."""
        return {} if source.languages is None else {"forced_bos_token_id": self._languages[source.languages[1]]}

    def tokenize(self, texts: Sequence[str], languages: tuple[str, str] | None) -> list[list[int]]:
        """Token ids, with the mark of the texts' language."""
        if languages is None:
            return super().tokenize(texts, languages)
        tokenizer: Any = self.tokenizer
        usual = tokenizer.src_lang
        tokenizer.src_lang = languages[0]
        try:
            return super().tokenize(texts, languages)
        finally:
            tokenizer.src_lang = usual

"""Text to token ids and back, and the chat template. The only importer of `tokenizers`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from photon.errors import PhotonError
from pipelines.files import read_json, write_json, write_text

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
UNKNOWN = "<|unknown|>"
SPECIALS = (UNKNOWN, IM_START, IM_END, VISION_START, VISION_END, VIDEO_PAD, "\n")
TOKENIZER, PROMPT = "tokenizer.json", "prompt.json"
PUBLIC_SYSTEM_PROMPT = "You are a helpful assistant."
"""What Qwen2.5-VL's own template says when nobody gives a system prompt."""
_REMEDY = "Use the tokenizer.json and prompt.json that were written beside the model."
_SPACE = "▁"


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A word-level tokenizer for a closed vocabulary: the words of ``texts``, punctuation and single digits."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    words = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    words |= {*"0123456789", "assistant", "user", _SPACE} | {f"{_SPACE}user", f"{_SPACE}assistant"}
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


class Prompter:
    """The chat template over one tokenizer: a closed vocabulary of words, or a public checkpoint's byte-level one.

    A prompt is ``<|im_start|>user\\n<|vision_start|><|video_pad|>...<|vision_end|>question<|im_end|>\\n
    <|im_start|>assistant\\n``, after ``<|im_start|>system\\n...<|im_end|>\\n`` where there is a system prompt. The part
    up to the last ``<|vision_end|>`` is the context, shared by every question about the scan; the rest is the branch.
    The context ends with a special token, at which every tokenizer splits, so context and branch are encoded apart as
    they would be together. An answer is encoded apart from the branch, which ends where generation begins.

    Attributes:
        system: the system prompt; None for none.
        special_ids: of the template's tokens, by the names that the configuration has for them.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        """Take a tokenizer (and switch off what would shorten or fill prompts).

        Raises:
            PhotonError: ``TOKENIZER_UNREADABLE`` when it lacks a token of the template or a word of the system turn.
        """
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        # Other tokens of white space open and close nothing, and the space that replaces tokens may be one of them.
        added = [token for token in added if token.strip() or token == "\n"]
        self._reserved = re.compile("|".join([r"<\|\w*\|>", *map(re.escape, sorted(added, key=len, reverse=True))]))
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown = self._id(unknown) if unknown else None
        self.special_ids = {
            "vision_start": self._id(VISION_START),
            "vision_end": self._id(VISION_END),
            "video": self._id(VIDEO_PAD),
            "eos": self._id(IM_END),
        }
        self.system = None if system is None else self._plain(system)
        if self.system is not None and (missing := self.unknown_words(f"system {self.system}")):
            fact = f"the tokenizer lacks the words {', '.join(missing)} of the system turn."
            raise PhotonError("TOKENIZER_UNREADABLE", PROMPT, fact, _REMEDY)

    @classmethod
    def read(cls, source: Path) -> Prompter:
        """Read a ``tokenizer.json`` and the ``prompt.json`` beside it.

        Where that file is absent, a tokenizer that knows every word gets the public template's system prompt, and
        a closed vocabulary none: those words are not its own.

        Raises:
            PhotonError: ``TOKENIZER_UNREADABLE`` when a file is malformed, or the tokenizer missing or without a
                token of the template.
        """
        try:
            prompter = cls(Tokenizer.from_str(source.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise PhotonError("TOKENIZER_UNREADABLE", source, "the file does not exist.", _REMEDY) from error
        except PhotonError:
            raise
        except Exception as error:  # the library raises bare Exception for malformed files
            raise PhotonError("TOKENIZER_UNREADABLE", source, f"it is not a tokenizer ({error}).", _REMEDY) from error
        if source.with_name(PROMPT).is_file():
            return cls(prompter.tokenizer, _read_system(source.with_name(PROMPT)))
        return prompter if prompter.is_closed else cls(prompter.tokenizer, PUBLIC_SYSTEM_PROMPT)

    def write(self, target: Path) -> None:
        """Write ``tokenizer.json`` and, beside it, ``prompt.json``, each atomically."""
        write_text(target, self.tokenizer.to_str(pretty=False))
        write_json(target.with_name(PROMPT), {"system": self.system})

    @property
    def is_closed(self) -> bool:
        """Whether there are words that the tokenizer has no ids for."""
        return self._unknown is not None

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.tokenizer.get_vocab_size())

    def context_ids(self, num_visual_tokens: Sequence[int]) -> Tensor:
        """Ids of the shared part for volumes of these token counts; empty without volumes."""
        if not num_visual_tokens:
            return torch.zeros(0, dtype=torch.long)
        ids = self._encode(self._opening())
        for count in num_visual_tokens:
            ids += [self.special_ids["vision_start"], *[self.special_ids["video"]] * count]
            ids.append(self.special_ids["vision_end"])
        return torch.tensor(ids)

    def branch_ids(self, question: str, *, has_volume: bool = True) -> Tensor:
        """Ids of one question up to where its answer begins.

        Raises:
            PhotonError: ``QUESTION_NOT_UNDERSTOOD`` when a word is not in the vocabulary.
        """
        text = self._plain(question)
        unknown = self.unknown_words(text)
        if unknown:
            raise PhotonError(
                "QUESTION_NOT_UNDERSTOOD",
                f"question {question!r}",
                f"the model was trained without the words {', '.join(unknown)}.",
                "Ask in the words of the training questions, or train on questions like this one.",
            )
        head = "" if has_volume else self._opening()
        return torch.tensor(self._encode(f"{head}{text}{IM_END}\n{IM_START}assistant\n"))

    def answer_ids(self, answer: str) -> Tensor:
        """Ids of an answer and its end of turn."""
        return torch.tensor([*self._encode(self._plain(answer)), self.special_ids["eos"]])

    def text(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def unknown_words(self, text: str) -> list[str]:
        """Words of ``text`` that the vocabulary lacks; none for a tokenizer that spells every word."""
        if not self.is_closed:
            return []
        text = self._plain(text)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        spans = zip(encoded.ids, encoded.offsets, strict=True)
        return sorted({text[start:end].strip() for token, (start, end) in spans if token == self._unknown})

    def _opening(self) -> str:
        """What comes before the first volume, or before the question without one."""
        system = "" if self.system is None else f"{IM_START}system\n{self.system}{IM_END}\n"
        return f"{system}{IM_START}user\n"

    def _plain(self, text: str) -> str:
        """Text with every special token defused, so that a question cannot open or close a turn.

        The line feed is one of them in a closed vocabulary; elsewhere lines stay lines.
        """
        num_found = 1
        while num_found:  # what surrounds a token may close up to another
            text, num_found = self._reserved.subn(" ", text)
        return text.strip()

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise PhotonError(
                "TOKENIZER_UNREADABLE",
                TOKENIZER,
                f"it has no token {token!r}.",
                "Use the tokenizer of a Qwen2.5-VL or Photon checkpoint.",
            )
        return int(found)


def _read_system(source: Path) -> str | None:
    content = read_json(source, "TOKENIZER_UNREADABLE", _REMEDY)
    if not isinstance(content, dict) or not isinstance(content.get("system", 0), str | None):
        fact = "it does not say what the system prompt is: a text, or null for none."
        raise PhotonError("TOKENIZER_UNREADABLE", source, fact, _REMEDY)
    system: str | None = content["system"]
    return system

"""Words to token ids and back, and the chat template. The only importer of `tokenizers`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from photon.errors import PhotonError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
UNKNOWN = "<|unknown|>"
SPECIALS = (UNKNOWN, IM_START, IM_END, VISION_START, VISION_END, VIDEO_PAD, "\n")
TOKENIZER = "tokenizer.json"
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
    """The chat template over one tokenizer.

    A prompt is ``<|im_start|>user\\n<|vision_start|><|video_pad|>...<|vision_end|>question<|im_end|>\\n
    <|im_start|>assistant\\n``. The part up to ``<|vision_end|>`` is the context, shared by every question
    about the scan; the rest is the branch.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_ids = {
            "vision_start": self._id(VISION_START),
            "vision_end": self._id(VISION_END),
            "video": self._id(VIDEO_PAD),
            "eos": self._id(IM_END),
        }

    @classmethod
    def read(cls, source: Path) -> Prompter:
        """Read a ``tokenizer.json``.

        Raises:
            PhotonError: ``TOKENIZER_UNREADABLE`` when it is missing, malformed or lacks a template token.
        """
        remedy = "Use the tokenizer.json that was written beside the model."
        try:
            return cls(Tokenizer.from_str(source.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise PhotonError("TOKENIZER_UNREADABLE", source, "the file does not exist.", remedy) from error
        except PhotonError:
            raise
        except Exception as error:  # the library raises bare Exception for malformed files
            raise PhotonError("TOKENIZER_UNREADABLE", source, f"it is not a tokenizer ({error}).", remedy) from error

    def write(self, target: Path) -> None:
        """Write ``tokenizer.json``."""
        target.write_text(self.tokenizer.to_str(pretty=False), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.tokenizer.get_vocab_size())

    def context_ids(self, num_visual_tokens: Sequence[int]) -> Tensor:
        """Ids of the shared part for volumes of these token counts; empty without volumes."""
        if not num_visual_tokens:
            return torch.zeros(0, dtype=torch.long)
        ids = self._encode(f"{IM_START}user\n")
        for count in num_visual_tokens:
            ids += [self.special_ids["vision_start"], *[self.special_ids["video"]] * count]
            ids.append(self.special_ids["vision_end"])
        return torch.tensor(ids)

    def branch_ids(self, question: str, *, has_volume: bool = True) -> Tensor:
        """Ids of one question up to where its answer begins.

        Raises:
            PhotonError: ``QUESTION_NOT_UNDERSTOOD`` when a word is not in the vocabulary.
        """
        text = _plain(question)
        unknown = self.unknown_words(text)
        if unknown:
            raise PhotonError(
                "QUESTION_NOT_UNDERSTOOD",
                f"question {question!r}",
                f"the model was trained without the words {', '.join(unknown)}.",
                "Ask in the words of the training questions, or train on questions like this one.",
            )
        head = "" if has_volume else f"{IM_START}user\n"
        return torch.tensor(self._encode(f"{head}{text}{IM_END}\n{IM_START}assistant\n"))

    def answer_ids(self, answer: str) -> Tensor:
        """Ids of an answer and its end of turn."""
        return torch.tensor([*self._encode(_plain(answer)), self.special_ids["eos"]])

    def text(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def unknown_words(self, text: str) -> list[str]:
        """Words of ``text`` that the vocabulary lacks."""
        text = _plain(text)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        unknown = self._id(UNKNOWN)
        spans = zip(encoded.ids, encoded.offsets, strict=True)
        return sorted({text[start:end].strip() for token, (start, end) in spans if token == unknown})

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


def _plain(text: str) -> str:
    """Text with every special token defused, so that a question cannot open or close a turn."""
    text, num_found = text.replace("\n", " "), 1
    while num_found:  # what surrounds a token may close up to another
        text, num_found = re.subn(r"<\|[^|]*\|>", " ", text)
    return text.strip()

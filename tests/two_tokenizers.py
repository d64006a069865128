"""Two real tokenizers that cut the same texts differently, and models for them."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from airl_fast import Policy
from airl_fast.language_model import LanguageModel, Origin
from tests.tiny_models import tiny_model

TEXTS = [
    "Janet has 16 eggs a day.\nShe eats 3 for breakfast.\n16 - 3 = 13.\nThe answer is 13.",
    "A robe takes 2 bolts of blue fibre.\r\nHalf of that is 1.\r\n2 + 1 = 3.\r\n#### 3",
    "Ünïcode: 3 × 4 = 12 🎉👩‍🚀.\n 日本語 steps.\n\tTabs, and  two spaces.",
]


def byte_bpe(texts: list[str] = TEXTS, *, size: int = 400, words: bool = True):
    """Byte-level BPE, as GPT-2's; without ``words`` it merges across words and lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def unigram(texts: list[str] = TEXTS, *, size: int = 300):
    """Unigram, as SentencePiece's, whose unknown characters are written as bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    plain = ["".join(c for c in text if ord(c) < 256) for text in texts]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(plain, trainer)
    # SentencePiece's byte fallback, which the trainer does not know.
    scored = [(piece, score) for piece, score in _pieces(tokenizer)]
    scored += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer.model = models.Unigram(scored, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def _pieces(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    import json

    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def policy_of(tokenizer, folder: Path, *, seed: int = 0) -> Policy:
    """A tiny Llama of random weights with this tokenizer, as a saved policy."""
    model = tiny_model("llama", seed=seed, vocab_size=len(tokenizer)).eval()
    LanguageModel(model, tokenizer, Origin(model="tiny"))  # as it is loaded
    Policy(model, tokenizer, Origin(model="tiny")).save(folder)
    return Policy.from_pretrained(folder)

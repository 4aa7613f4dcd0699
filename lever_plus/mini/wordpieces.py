"""The two tiny tokenizers, built from the world's words by the ``tokenizers`` library."""

import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lever_plus.mini.vocabulary import COLOR_NAMES, SHAPES, TYPES
from open_mmicl.interface.prompts import PromptFormat

#: Qwen2.5-VL's special tokens, in its order.
QWEN_SPECIAL: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

#: Qwen2.5-VL's turn structure; no system message is invented where none is given.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def answer_words() -> list[str]:
    """Every word that a true answer can hold."""
    return [word for kind in TYPES for word in (*kind.answers, *kind.adjectives)]


def _corpus() -> Iterable[str]:
    user = PromptFormat().user_template
    for kind in TYPES:
        for question in kind.questions:
            yield from [user.replace("<Q>", question), question] * 60
    yield from ["system\n", "user\n", "assistant\n"] * 200
    yield from answer_words() * 60
    for kind in TYPES:  # synonyms: known letters, not whole tokens
        yield from kind.synonyms


def qwen_tokenizer(vocab_size: int = 1100) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with Qwen2.5-VL's special tokens and chat turns.

    Newlines are split off and every piece begins with the word mark, so a word is the same token inside
    a demonstration and right after ``assistant\\n``.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(_corpus(), _trainer(vocab_size, ["<unk>"]))
    tokenizer.add_special_tokens(list(QWEN_SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in QWEN_SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def clip_tokenizer(vocab_size: int = 700, max_length: int = 24) -> PreTrainedTokenizerFast:
    """A lower-casing BPE tokenizer that frames a text by start and end tokens, as CLIP's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[a-z0-9]+|[^\sa-z0-9]"), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    names = [" ".join([*COLOR_NAMES, *(shape.replace("_", " ") for shape in SHAPES), "a photo of a picture the"])]
    texts = [*_corpus(), *(names * 60)]
    tokenizer.train_from_iterator(texts, _trainer(vocab_size, ["<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>"]))
    start, end = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _trainer(vocab_size: int, special: list[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=[*string.printable.strip(), "\n", "\u2581"],
        show_progress=False,
    )

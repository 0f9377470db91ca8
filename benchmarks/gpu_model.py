"""Qwen2.5-VL-7B's shape without its weights: configuration, tokenizer and processor, made here, nothing downloaded.

What a model costs is decided by its sizes, not by what it has learnt. The tokenizer has as many tokens as the real one;
each is a space and some letters, so a text of so many words is as many tokens.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH = 28  # pixels to a side of what becomes one token


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    :param words: Tokens of the tokenizer, without the special ones.
    :param vocabulary: Tokens that the model has a logit for.
    """

    words: int
    vocabulary: int
    text: dict[str, Any]
    vision: dict[str, Any]


# As in the configuration that was published with Qwen2.5-VL-7B-Instruct.
SEVEN_B = Shape(
    words=151_643,
    vocabulary=152_064,
    text={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_window_layers": 28,
    },
    vision={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    },
)
# To try the benchmark without a GPU.
TINY = Shape(
    words=2_000,
    vocabulary=2_048,
    text={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8192,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    },
    vision={
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    },
)


def make_config(shape: Shape, token_ids: dict[str, int]) -> Any:
    """The model's configuration.

    :param token_ids: Of the special tokens.
    """
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
        text_config={
            "vocab_size": shape.vocabulary,
            "rope_theta": 1_000_000.0,
            "bos_token_id": token_ids["<|endoftext|>"],
            "eos_token_id": token_ids[END],
            "pad_token_id": token_ids["<|endoftext|>"],
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            **shape.text,
        },
        vision_config=shape.vision,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def make_tokenizer(shape: Shape) -> Any:
    """A byte-level BPE tokenizer whose words are all strings of one, two, three letters and so on, up to its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    # How byte-level tokenizers write a space.
    shorter = ["\u0120"]
    while len(vocabulary) < shape.words:
        longer = []
        for word in shorter:
            for letter in string.ascii_lowercase[: shape.words - len(vocabulary)]:
                merges.append((word, letter))
                longer.append(word + letter)
                vocabulary[word + letter] = len(vocabulary)
        shorter = longer
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return Qwen2TokenizerFast(
        tokenizer_object=bpe, unk_token=None, bos_token=None, eos_token=END, pad_token="<|endoftext|>"
    )


def make_folder(shape: Shape, folder: Path) -> Path:
    """Write all of a model but its weights."""
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = make_tokenizer(shape)
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    config = make_config(shape, {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS})
    config.save_pretrained(folder)
    eos, pad = tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"])
    GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad).save_pretrained(folder)
    return folder


def end_token(folder: Path) -> int:
    """The token by which the model in a folder ends an answer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["text_config"]["eos_token_id"])


def words(count: int, seed: int, shape: Shape) -> str:
    """A text of so many words, each a token of the shape's tokenizer."""
    import random

    dice = random.Random(seed)
    # Of all words with so many letters, the tokenizer knows the longest ones in part only.
    letters = 1
    while 256 + sum(26**length for length in range(1, letters + 2)) <= shape.words:
        letters += 1
    return " ".join("".join(dice.choices(string.ascii_lowercase, k=letters)) for _ in range(count))

"""Models that continue a text beside a picture, with random weights, small enough to be made within a test.

They are of the kinds that know no conversation: their checkpoints have no chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIDE = 32
# Weights this large make the logits differ clearly: rounding must not choose between two tokens.
SPREAD = 0.2
WORDS = ("a", "photo", "of", "question", "what", "is", "it", "?", "answer", ":", "red", "circle")


def tiny_blip(folder: Path, *, seed: int = 0) -> Path:
    """Write a BLIP: a text decoder that looks at the picture through cross-attention.

    :param folder: Where to; made when it is not there.
    :param seed: Decides the weights.
    """
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
        GenerationConfig,
    )

    # As published, BLIP begins with a token of its own, and ends with another than its configuration says.
    tokenizer = word_tokenizer("[DEC]")
    begin, separator = tokenizer.convert_tokens_to_ids(["[DEC]", "[SEP]"])
    config = BlipConfig(
        text_config={
            **_TEXT,
            "vocab_size": len(tokenizer),
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": SPREAD,
            "bos_token_id": begin,
            "eos_token_id": 2,
            "sep_token_id": separator,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**_VISION, "initializer_range": SPREAD},
    )
    processor = BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer)
    defaults = GenerationConfig(bos_token_id=begin, eos_token_id=2, pad_token_id=tokenizer.pad_token_id)
    return _written(BlipForConditionalGeneration, config, processor, folder, seed, defaults)


def tiny_blip2(folder: Path, *, language_model: str = "opt", seed: int = 0) -> Path:
    """Write a BLIP-2.

    :param folder: Where to; made when it is not there.
    :param language_model: ``opt`` (goes on with the prompt) or ``t5`` (reads the prompt, then writes).
    :param seed: Decides the weights.
    """
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    tokenizer = byte_tokenizer(ends_prompts=language_model == "t5")
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer, num_query_tokens=4
    )
    config = Blip2Config(
        text_config=_language_config(language_model, tokenizer),
        qformer_config=_QFORMER,
        vision_config={**_VISION, "initializer_range": SPREAD},
        num_query_tokens=4,
        initializer_range=SPREAD,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _written(Blip2ForConditionalGeneration, config, processor, folder, seed)


def tiny_instructblip(folder: Path, *, seed: int = 0) -> Path:
    """Write an InstructBLIP: a BLIP-2 whose eyes read the prompt, too.

    :param folder: Where to; made when it is not there.
    :param seed: Decides the weights.
    """
    from transformers import (
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    tokenizer, words = byte_tokenizer(ends_prompts=False), word_tokenizer()
    processor = InstructBlipProcessor(
        BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer, words, num_query_tokens=4
    )
    config = InstructBlipConfig(
        text_config=_language_config("opt", tokenizer),
        qformer_config={**_QFORMER, "vocab_size": len(words)},
        vision_config={**_VISION, "initializer_range": SPREAD},
        num_query_tokens=4,
        initializer_range=SPREAD,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _written(InstructBlipForConditionalGeneration, config, processor, folder, seed)


def tiny_git(folder: Path, *, seed: int = 0) -> Path:
    """Write a GIT: picture and text in one sequence, the picture without tokens that stand for it.

    :param folder: Where to; made when it is not there.
    :param seed: Decides the weights.
    """
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    tokenizer = word_tokenizer()
    config = GitConfig(
        **_TEXT,
        vision_config=_VISION,
        vocab_size=len(tokenizer),
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=SPREAD,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = GitProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}), tokenizer
    )
    return _written(GitForCausalLM, config, processor, folder, seed)


def tiny_florence2(folder: Path, *, seed: int = 0) -> Path:
    """Write a Florence-2, which is asked with the names of tasks.

    :param folder: Where to; made when it is not there.
    :param seed: Decides the weights.
    """
    from transformers import (
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        GenerationConfig,
    )

    tokenizer = byte_tokenizer(ends_prompts=True, image_token="<image>")
    images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    # What is left of the picture after four strides, and one token for the whole of it.
    images.image_seq_length = (SIDE // 32) ** 2 + 1
    processor = Florence2Processor(images, tokenizer)
    config = Florence2Config(
        text_config=_language_config("bart", tokenizer),
        vision_config={
            "depths": [1, 1, 1, 1],
            "embed_dim": [8, 16, 32, 64],
            "num_heads": [1, 1, 2, 2],
            "num_groups": [1, 1, 2, 2],
            "window_size": 4,
            "drop_path_rate": 0.0,
            "projection_dim": 64,
            "initializer_range": SPREAD,
        },
        image_token_id=tokenizer.image_token_id,
    )
    defaults = GenerationConfig(
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_bos_token_id=tokenizer.bos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        no_repeat_ngram_size=3,
        num_beams=3,
        early_stopping=True,
    )
    return _written(Florence2ForConditionalGeneration, config, processor, folder, seed, defaults)


def word_tokenizer(*more: str) -> Any:
    """A tokenizer of single letters and a few words, which knows no capitals, as BERT's.

    :param more: Further special tokens.
    """
    from transformers import BertTokenizerFast

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *more]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *WORDS])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    words.add_special_tokens(special)
    return BertTokenizerFast(tokenizer_object=words, model_input_names=["input_ids", "attention_mask"])


def byte_tokenizer(*, ends_prompts: bool, **special_tokens: str) -> Any:
    """A tokenizer of single bytes with a token that stands for a picture.

    :param ends_prompts: Whether a prompt ends with the end token, rather than begins with it as OPT's.
    :param special_tokens: Special tokens by the names of the attributes that they are to have.
    """
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    bytes_.train_from_iterator([" a photo of a red circle", '{"tags": ["red"]}'] * 4, trainer)
    bytes_.post_processor = processors.TemplateProcessing(
        single="$A </s>" if ends_prompts else "</s> $A", special_tokens=[("</s>", bytes_.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=special_tokens,
    )


_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_VISION = {**_TEXT, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
_QFORMER = {
    **_TEXT,
    "num_attention_heads": 2,
    "encoder_hidden_size": 64,
    "cross_attention_frequency": 1,
    "initializer_range": SPREAD,
}


def _language_config(kind: str, tokenizer: Any) -> dict[str, Any]:
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    if kind == "opt":
        return {
            **ids,
            "model_type": "opt",
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 256,
            "init_std": SPREAD,
            # As published: a caption ends with its line.
            "eos_token_id": tokenizer.convert_tokens_to_ids("Ċ"),
            "bos_token_id": 2,
        }
    if kind == "t5":
        return {
            **ids,
            "model_type": "t5",
            "d_model": 64,
            "d_kv": 32,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 1,
            "initializer_factor": 3.0,
        }
    return {
        **ids,
        "model_type": "bart",
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": 128,
        "init_std": SPREAD,
    }


def _written(
    model_class: Any, config: Any, processor: Any, folder: Path, seed: int, defaults: Any = None
) -> Path:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        if hasattr(model, "query_tokens"):
            # They begin as zeros, with which all pictures look alike.
            model.query_tokens.data.normal_()
        if model_class.__name__.startswith("Blip2") and config.text_config.model_type == "t5":
            # Otherwise T5 would look at little but its last token, and be quite sure of the next.
            for name, weight in model.language_model.named_parameters():
                weight.data *= 3.0 if "EncDecAttention" in name else 0.03 if "shared" in name else 1.0
    if defaults is not None:
        model.generation_config = defaults
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

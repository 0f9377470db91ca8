"""Several candidates of one prompt, which the model reads once: a decoding loop for transformers' ``generate``."""

from __future__ import annotations

from typing import Any

# What only the reading of the prompt needs. Of pictures there can be many times more than of anything else.
_READ = ("pixel_values", "mm_encoder_outputs", "inputs_embeds")


class SharedPrefill:
    """Goes on from every prompt so many times; a ``custom_generate`` of ``generate``.

    By itself, ``generate`` repeats its inputs before the model reads them, so that four candidates cost four times
    the reading, and with some models four times the looking at the picture. This reads first and then repeats what
    came of it: the cache. Tokens are whatever the logits processors leave as the likeliest, and the end is where the
    stopping criteria say so.

    :param candidates: How many answers each prompt gets, one after another in the batch.
    """

    def __init__(self, candidates: int) -> None:
        self._candidates = candidates

    @staticmethod
    def works_with(model: Any) -> bool:
        """Whether this version of transformers has what the loop is made of."""
        return hasattr(model, "_prefill")

    def __call__(
        self,
        model: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        import torch

        encoder_decoder = model.config.is_encoder_decoder
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=encoder_decoder
        )
        repeated = torch.arange(input_ids.shape[0], device=input_ids.device).repeat_interleave(
            self._candidates
        )
        logits = outputs.logits[:, -1].index_select(0, repeated.to(outputs.logits.device))
        del outputs
        input_ids, model_kwargs = model._expand_inputs_for_generation(
            input_ids=input_ids,
            expand_size=self._candidates,
            is_encoder_decoder=encoder_decoder,
            **{name: value for name, value in model_kwargs.items() if not name.startswith(_READ)},
        )
        model_kwargs["past_key_values"].reorder_cache(repeated)
        while True:
            # A copy, because processors may write into it, and in the precision in which `generate` picks tokens.
            scores = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
            tokens = logits_processor(input_ids, scores).argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, tokens], dim=-1)
            if stopping_criteria(input_ids, None).all():
                return input_ids
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=encoder_decoder
            )
            logits = outputs.logits[:, -1]
            del outputs

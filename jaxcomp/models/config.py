"""Reading of Hugging Face ``config.json`` files, field by field: nothing unknown is passed over."""

import difflib
import json
import pathlib
from typing import Any

from jaxcomp.errors import ModelError

# Fields that do not change what a model computes at inference.
IGNORED = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout
    attention_probs_dropout_prob attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_dropout decoder_start_token_id directionality
    diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout_prob id2label initializer_range
    keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache
    """.split()
)
_REQUIRED = object()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      path: the file.

    Returns:
      The object.

    Raises:
      ModelError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); expected a model folder in Hugging Face "
            "layout, with config.json and model.safetensors"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); download or write it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


class Fields:
    """The fields of a configuration, taken one by one; ``done`` refuses those that are left."""

    def __init__(self, values: dict[str, Any], where: str):
        """Starts with all of ``values``; ``where`` names the file in errors."""
        self.values, self.where, self.known = dict(values), where, set()

    def error(self, name: str, rule: str) -> ModelError:
        """An error about one field."""
        return ModelError(f"{self.where}: field {name!r}: {rule}")

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field's value, or the default when it is absent."""
        self.known.add(name)
        if name in self.values:
            return self.values.pop(name)
        if default is _REQUIRED:
            raise self.error(name, "missing, and it has no default; add it")
        return default

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """A positive integer; null means the default."""
        value = self.take(name, default)
        if value is None and default is not _REQUIRED:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, f"must be a positive integer, got {value!r}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(name, f"must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """A list of ``count`` positive integers; empty when it is absent or null."""
        value = self.take(name, None)
        if value is None:
            return ()
        if (
            not isinstance(value, list)
            or len(value) != count
            or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in value)
        ):
            raise self.error(
                name, f"must be a list of {count} positive integers, one a layer, got {value!r}"
            )
        return tuple(value)

    def only(self, name: str, *allowed: Any) -> Any:
        """A field of which this library knows only some values; the first is the default."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            known = ", ".join(repr(a) for a in allowed)
            raise self.error(name, f"{value!r} is not supported; supported: {known}")
        return value

    def done(self) -> None:
        """Raises if a field is left that nobody took and that matters."""
        left = sorted(set(self.values) - IGNORED)
        if not left:
            return
        close = difflib.get_close_matches(left[0], self.known, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ModelError(
            f"{self.where}: unknown field{'s' if len(left) > 1 else ''} "
            f"{', '.join(map(repr, left))}{hint}; the model might compute something else than this "
            "library would, remove what has no effect"
        )

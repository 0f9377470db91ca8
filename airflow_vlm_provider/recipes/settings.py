"""The settings of a Data-Juicer recipe besides its operators, and what they mean here.

Every setting that Data-Juicer 1.6 knows is in one of these tables, so that a name that is in none is a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping

SHARED: Mapping[str, str] = {
    "image_key": "image_key",
    "video_key": "video_key",
    "image_special_token": "image_special_token",
    "video_special_token": "video_special_token",
    "audio_special_token": "audio_special_token",
    "eoc_special_token": "eoc_special_token",
}
"""Settings that each step has as a parameter: that parameter's name."""

READ = frozenset({"dataset_path", "dataset", "export_path", "text_keys", "suffixes", "process"})
"""Settings that are read one by one."""

_SPREAD = "how work is spread is Airflow's part: max_tasks, pool, queue, concurrency"
_KEPT = "what is done is kept in the ledger beside the output, and a rerun goes on from there"
_WATCHED = "progress is in the task's log, and what became of each row in manifests and dead letters"
_WRITTEN = "each shard is written again under its own name, in its own format"
_READ_BY_ROW = "shards are read row by row, and a row that can't be is a dead letter"
_ANALYSIS = "nothing is filtered, deduplicated or analysed here"
_OTHER_TOOL = "it is for another of Data-Juicer's tools"

_IGNORED_FOR: Mapping[str, tuple[str, ...]] = {
    _SPREAD: (
        "adaptive_batch_size",
        "auto_op_parallelism",
        "conflict_resolve_strategy",
        "elastic_juicer_adaptive_batching",
        "elastic_juicer_profile_seed",
        "enable_optimizer",
        "executor_type",
        "fusion_strategy",
        "mapper_fusion",
        "mapper_fusion_vram_limit",
        "min_common_dep_num_to_combine",
        "np",
        "op_fusion",
        "optimizer_strategies",
        "override_num_blocks",
        "partition",
        "partition_dir",
        "partition_size",
        "ray_address",
        "turbo",
        "use_dag",
    ),
    _KEPT: (
        "cache_compress",
        "checkpoint",
        "checkpoint_dir",
        "ds_cache_dir",
        "job_id",
        "resume",
        "temp_dir",
        "use_cache",
        "use_checkpoint",
        "work_dir",
    ),
    _WATCHED: (
        "debug",
        "event_log_dir",
        "event_logging",
        "op_list_to_trace",
        "open_monitor",
        "open_tracer",
        "trace_keys",
        "trace_num",
    ),
    _WRITTEN: ("export_extra_args", "export_in_parallel", "export_shard_size", "export_type"),
    _READ_BY_ROW: ("load_dataset_kwargs", "load_jsonl_lenient", "read_options", "validators"),
    _ANALYSIS: (
        "export_original_dataset",
        "keep_hashes_in_res_ds",
        "keep_stats_in_res_ds",
        "op_list_to_mine",
        "open_insight_mining",
        "percentiles",
        "save_stats_in_one_file",
    ),
    _OTHER_TOOL: ("auto_num", "data_probe_algo", "data_probe_ratio", "hpo_config"),
    "the operators are the ones that are listed below process": ("custom_operator_paths",),
    "a row that fails is a dead letter, and max_error_rate says how many may": ("skip_op_error",),
    "a recipe is checked when the DAG is parsed": ("strict_preflight",),
    "images that a shard embeds are found without it": ("image_bytes_key",),
    "sounds are not looked at": ("audio_key",),
    "the group is named by group_id, or else after the recipe's file": ("project_name",),
}

IGNORED: Mapping[str, str] = {name: reason for reason, names in _IGNORED_FOR.items() for name in names}
"""Settings without a meaning here: why."""

REFUSED: Mapping[str, str] = {
    "auto": "it replaces the operators by an analysis, which does not exist here. Remove it.",
    "generated_dataset_config": (
        "it makes a dataset up instead of reading one. Write it to shards first, and name them by dataset_path."
    ),
    "decrypt_after_reading": "shards are read as they are. Decrypt them first, or leave that to the storage.",
    "encrypt_before_export": "shards are written as they are. Leave encryption to the storage, and remove it.",
    "encryption_key_path": "nothing is encrypted or decrypted here. Leave that to the storage, and remove it.",
    "export_aws_credentials": (
        "it belongs in an Airflow connection. Remove it, and name the connection by aws_conn_id."
    ),
}
"""Settings that can't be done without and aren't done here: why, and what to do instead. Null and false are fine."""

KNOWN = frozenset({*SHARED, *READ, *IGNORED, *REFUSED})


def setting_of(name: str) -> str:
    """The setting that a name is of: ``checkpoint`` for ``checkpoint.enabled``, which is another way to write it."""
    first, dot, _ = name.partition(".")
    return first if dot and first in ("checkpoint", "event_logging", "partition") else name
